"""`lut-ds finetune` from outside: it learns, it can be continued to the bit, and it refuses what cannot work."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from lut_ds.errors import UserError
from lut_ds.method.encoder import Encoder
from lut_ds.tracking import read_metrics
from lut_ds.transfer.config import FinetuneRecipe, finetune_folder, load_finetune_recipe
from lut_ds.transfer.finetune_start import open_images, start_model
from tests.engine.launching import run_ranks
from tests.transfer.runs import lut_ds

SIZES = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2}
VOLATILE = ("images_per_s", "data_wait")
STEPS = 8


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the published code writes them, of an encoder that was not trained."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.manual_seed(0)
    torch.save({"model": Encoder(16, 4, 32, 2, 2).state_dict(), "epoch": 0}, path)
    return path


@pytest.fixture(scope="module")
def few(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty digits to train on and 13 for evaluation, which two ranks cannot share evenly, of three classes."""
    folder = tmp_path_factory.mktemp("few") / "data"
    for split, counts in (("train", (10, 10, 10)), ("val", (5, 4, 4))):
        for digit, count in enumerate(counts):
            (folder / split / str(digit)).mkdir(parents=True)
            for image in sorted((digits / split / str(digit)).iterdir())[:count]:
                shutil.copy(image, folder / split / str(digit))
    return folder


def write_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """Four epochs of two steps with all of the augmentation."""
    tree: dict[str, Any] = {
        "model": SIZES,
        "data": {"threads": 1},
        "optim": {"warmup_epochs": 1, "blr": 0.01},
        "train": {"epochs": 4, "global_batch": 15, "compile": False, "deepspeed": "cpu"},
        "precision": {"compute": "fp32"},
        "run": {"log_every": 1, "seed": 3},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def finetune(folder: Path, encoder: Path, few: Path, recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    options = (f"data.path={few}", f"run.dir={folder / 'run'}", *overrides)
    return lut_ds("finetune", str(encoder), str(recipe), *options, "--json", cwd=folder)


def curve(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in VOLATILE} for r in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, encoder: Path, few: Path) -> tuple[Path, dict[str, Any]]:
    """A run that nothing interrupted, with an average of its weights, and its result."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = finetune(folder, encoder, few, write_recipe(folder, optim={"ema_decay": 0.5}))
    assert done.returncode == 0, done.stderr
    return folder / "run", json.loads(done.stdout)


def test_result_files(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    run, result = undisturbed
    assert (result["step"], result["stopped_by"]) == (STEPS, None)
    assert json.loads((run / "results.json").read_text()) == result
    evaluations = read_metrics(run / "evaluations.jsonl")
    assert [(e["step"], e["images"]) for e in evaluations] == [(2, 13), (4, 13), (6, 13), (8, 13)]
    best = max(evaluations, key=lambda e: e["top1"])
    assert result["best"] == {
        key: best[key] for key in ("step", "epoch", "top1", "top5", "mean_class", "many", "medium", "few")
    }
    assert result["top1"] == evaluations[-1]["top1"]
    table = json.loads((run / "per_class.json").read_text())
    assert {name: row["train_images"] for name, row in table.items()} == {"0": 10, "1": 10, "2": 10}
    accuracies = [row["accuracy"] for row in table.values()]
    assert result["mean_class"] == result["few"] == pytest.approx(sum(accuracies) / 3)
    assert result["many"] is result["medium"] is None
    assert result["top1"] == pytest.approx(sum(a * n for a, n in zip(accuracies, (5, 4, 4), strict=True)) / 13)
    assert best["top5"] == 100.0, "of three classes, all are among the first five"
    assert result["loaded"]["fresh"] == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert result["loaded"]["left_out"] == ["norm.bias", "norm.weight"]
    records = read_metrics(run / "metrics.jsonl")
    assert all(record["applied"] == 1 for record in records)


def test_timm_loads_the_best(undisturbed: tuple[Path, dict[str, Any]], few: Path) -> None:
    """The exported classifier, evaluated with timm's own transform, is as accurate as the run says."""
    from PIL import Image

    run, result = undisturbed
    model = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
    right = 0
    for path in sorted((few / "val").glob("*/*.jpg")):
        logits = model(transform(Image.open(path).convert("RGB"))[None])
        right += int(logits.argmax().item() == int(path.parent.name))
    assert 100 * right / 13 == pytest.approx(result["best"]["top1"])


def test_continued_run_is_the_same_to_the_bit(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, encoder: Path, few: Path
) -> None:
    """Stopped in the middle of an epoch; RandAugment, mixing, erasing and dropped paths come again as they would have been."""
    recipe = write_recipe(tmp_path, optim={"ema_decay": 0.5})
    first = finetune(tmp_path, encoder, few, recipe, "train.max_steps=3")
    assert first.returncode == 0, first.stderr
    second = finetune(tmp_path, encoder, few, recipe)
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["resumed_from"] == 3
    run, reference = tmp_path / "run", undisturbed[0]
    assert curve(run) == curve(reference)
    for part in ("best", "last"):
        found, expected = (load_file(folder / part / "model.safetensors") for folder in (run, reference))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_two_ranks_train_and_count_as_one(tmp_path: Path, encoder: Path, few: Path) -> None:
    """Without what is drawn for a micro-batch as a whole, losses agree; 13 images are counted once each."""
    calm = {"mixup": 0.0, "cutmix": 0.0}
    curves, evaluations = [], []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        recipe = write_recipe(folder, augment=calm, model={"drop_path": 0.0}, train={"global_batch": 10})
        options = [f"data.path={few}", f"run.dir={folder / 'run'}", "train.max_steps=6"]
        run_ranks([sys.executable, "-m", "lut_ds", "finetune", str(encoder), str(recipe), *options], ranks)
        curves.append([record["loss"] for record in curve(folder / "run")])
        evaluations.append(read_metrics(folder / "run" / "evaluations.jsonl")[-1])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert evaluations[0]["images"] == evaluations[1]["images"] == 13
    assert evaluations[0]["loss"] == pytest.approx(evaluations[1]["loss"], abs=1e-3)


@pytest.mark.slow
def test_learns_digits(tmp_path: Path, digits: Path) -> None:
    """From an untrained encoder, ten classes: far above one in ten."""
    torch.save({"model": Encoder(24, 4, 96, 4, 4).state_dict()}, tmp_path / "encoder.pth")
    options = ("train.epochs=6", "data.threads=1", f"data.path={digits}", f"run.dir={tmp_path / 'run'}")
    done = lut_ds("finetune", "encoder.pth", "finetune_demo", *options, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"]["top1"] > 60


@pytest.mark.parametrize("name", sorted(path.stem for path in finetune_folder().glob("*.yaml")))
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_finetune_recipe(name, ["data.path=images"])
    assert recipe.model.pool == "mean"
    epochs = {"finetune_vitb16": 100, "finetune_vits16": 100, "finetune_vitl16": 50, "finetune_vith14": 50}
    assert recipe.train.epochs == epochs.get(name, recipe.train.epochs)


@pytest.mark.parametrize(
    "override,words",
    [
        ("optim.layer_decy=0.5", "did you mean optim.layer_decay"),
        ("augment.randaugment=rand-m9", "expected rand-m"),
        ("model.pool=max", "model.pool"),
        ("method.mask_ratio=0.5", "unknown key method"),
    ],
)
def test_recipe_errors(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_finetune_recipe("finetune_vitb16", [override])


def recipe_for(encoder: Path, few: Path, **model: Any) -> FinetuneRecipe:
    return FinetuneRecipe.model_validate(
        {"model": {**SIZES, "source": str(encoder), **model}, "data": {"path": str(few)}}
    )


def test_what_is_left_out_of_a_file_is_told(encoder: Path, few: Path, tmp_path: Path) -> None:
    state = torch.load(encoder, weights_only=True)["model"]
    extra = {"mask_token": torch.zeros(1, 1, 4), "decoder_embed.weight": torch.zeros(4, 32)}
    torch.save({"model": state | extra}, tmp_path / "mae.pth")
    _, loaded = start_model(recipe_for(tmp_path / "mae.pth", few), ["a", "b"])
    assert loaded.not_read == {"mask_token": 1, "decoder_embed": 1}


def test_positions_are_interpolated(encoder: Path, few: Path) -> None:
    model, loaded = start_model(recipe_for(encoder, few, image_size=24), ["a", "b"])
    assert loaded.positions == (4, 6)
    assert model(torch.zeros(1, 3, 24, 24)).shape == (1, 2)


@pytest.mark.parametrize(
    "model,words", [({"width": 64}, "model.width"), ({"depth": 3}, "model.depth"), ({"patch_size": 8}, "patch")]
)
def test_other_architectures_are_refused(encoder: Path, few: Path, model: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        start_model(recipe_for(encoder, few, **model), ["a", "b"])


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, encoder: Path, few: Path) -> None:
    content = torch.load(encoder, weights_only=True)
    content["model"]["blocks.1.attn.qkv.weight"][0, 0] = torch.nan
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="NaN or infinity"):
        start_model(recipe_for(tmp_path / "bad.pth", few), ["a", "b"])


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda folder: shutil.rmtree(folder / "val" / "2"), "same classes.*'2' in train alone"),
        (lambda folder: (folder / "val" / "2").rename(folder / "val" / "3"), "same classes"),
        (
            lambda folder: [image.unlink() for image in (folder / "train" / "1").iterdir()],
            "train: expected images of each of 3 classes, found none of '1'",
        ),
        (lambda folder: shutil.rmtree(folder / "val"), "val"),
        (lambda folder: (folder / "val" / "3").mkdir(), "'3' in val alone"),
    ],
)
def test_class_folders_that_do_not_fit_are_refused(
    tmp_path: Path, encoder: Path, few: Path, change: Any, words: str
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(few, folder)
    change(folder)
    with pytest.raises(UserError, match=words):
        open_images(recipe_for(encoder, folder))


def test_a_batch_of_more_images_than_there_are_is_refused_with_the_data(encoder: Path, few: Path) -> None:
    with pytest.raises(UserError, match="expected at most the 30 training images"):
        open_images(recipe_for(encoder, few))


def test_refused_command_leaves_nothing(tmp_path: Path, encoder: Path, few: Path) -> None:
    done = finetune(tmp_path, encoder, few, write_recipe(tmp_path), "model.width=64")
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith("lut-ds:")]) == 1, done.stderr
    assert "model.width" in done.stderr
    assert not (tmp_path / "run").exists()
