"""`lut-ds segment` from outside: what it leaves, that it continues to the bit, that ranks share it, and what it refuses."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lut_ds.data.scenes import CLASSES, write_scenes
from lut_ds.engine.launch import Ranks, discover_ranks, process_group
from lut_ds.errors import UserError
from lut_ds.method.encoder import Encoder
from lut_ds.tracking import read_metrics
from lut_ds.transfer.segmentation.config import load_segment_recipe, segment_folder
from lut_ds.transfer.segmentation.evaluate import Windows, evaluate
from lut_ds.transfer.segmentation.folder import Labels, MaskedImages, class_names
from lut_ds.transfer.segmentation.start import check_masks, load_segmenter, open_masked, recipe_for, start_model
from lut_ds.transfer.segmentation.step import SegmentSchedule, pixel_loss
from lut_ds.transfer.segmentation.upernet import resized
from tests.engine.launching import PATIENCE, run_ranks, start_ranks

VOLATILE = ("images_per_s", "data_wait")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the published code writes them, of an encoder that was not trained."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.manual_seed(0)
    torch.save({"model": Encoder(16, 8, 16, 4, 2).state_dict(), "epoch": 0}, path)
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten scenes to train on and five for evaluation, which two ranks cannot share evenly."""
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", train=10, val=5, size=40)


def write_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """Five steps of four crops of 32 px with everything that is drawn."""
    tree: dict[str, Any] = {
        "model": {"image_size": 32, "source_heads": 2, "channels": 4, "aux_channels": 4},
        "data": {"classes": 6, "threads": 1, "eval_batch": 2, "pictures": 2},
        "optim": {"warmup_steps": 1, "lr": 0.01},
        "train": {"iterations": 5, "evaluate_every": 3, "global_batch": 4, "compile": False, "deepspeed": "cpu"},
        "precision": {"compute": "fp32", "teacher": "fp32"},
        "run": {"log_every": 1, "seed": 3},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(encoder: Path, recipe: Path, scenes: Path, run: Path, *overrides: str) -> list[str]:
    options = [f"data.path={scenes}", f"run.dir={run}", *overrides]
    return [sys.executable, "-m", "lut_ds", "segment", str(encoder), str(recipe), *options, "--json"]


def segment(encoder: Path, recipe: Path, scenes: Path, run: Path, *overrides: str) -> dict[str, Any]:
    (out, _), *_ = run_ranks(command(encoder, recipe, scenes, run, *overrides), 1)
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def curve(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in VOLATILE} for r in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, encoder: Path, scenes: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder / "run", segment(encoder, write_recipe(folder), scenes, folder / "run")


def test_result_files(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    run, result = undisturbed
    assert (result["step"], result["stopped_by"]) == (5, None)
    assert json.loads((run / "results.json").read_text()) == result
    evaluations = read_metrics(run / "evaluations.jsonl")
    assert [(e["step"], e["images"], len(e["iou"])) for e in evaluations] == [(3, 5, 6), (5, 5, 6)]
    best = max(evaluations, key=lambda e: e["miou"])
    assert result["best"] == {key: best[key] for key in ("step", "epoch", "miou", "macc", "aacc")}
    assert set(result["classes"]) == set(CLASSES)
    assert result["loaded"]["positions"] == [2, 4]
    records = read_metrics(run / "metrics.jsonl")
    assert all(record["applied"] == 1 for record in records)
    assert all(record["loss"] == pytest.approx(record["main"] + 0.4 * record["aux"]) for record in records)
    with Image.open(run / "predictions.png") as sheet:
        assert sheet.height > 2 * 256


def test_best_loads_and_scores_the_same(undisturbed: tuple[Path, dict[str, Any]], scenes: Path) -> None:
    run, result = undisturbed
    model, config = load_segmenter(run / "best")
    assert (config["classes"], config["stride"]) == (list(CLASSES), 21)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return resized(model((pixels.permute(0, 3, 1, 2) / 255 - mean) / std), pixels.shape[1:3])

    images = MaskedImages(scenes, "val", Labels(6, True))
    found, shown = evaluate(
        logits, images, 6, Windows(32, 21, 2), Ranks(0, 1, 0, torch.device("cpu"), "none"), 1, pictures=1
    )
    assert found["miou"] == pytest.approx(result["best"]["miou"], abs=0.05)
    assert shown[0].shape == np.asarray(images.load(0)[1]).shape


def test_continued_run_is_the_same_to_the_bit(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, encoder: Path, scenes: Path
) -> None:
    """Stopped between evaluations, in the middle of an epoch; crops, colours, dropout and dropped paths come again."""
    recipe = write_recipe(tmp_path)
    segment(encoder, recipe, scenes, tmp_path / "run", "train.max_steps=4")
    second = segment(encoder, recipe, scenes, tmp_path / "run")
    assert second["resumed_from"] == 4
    run, reference = tmp_path / "run", undisturbed[0]
    assert curve(run) == curve(reference)
    found, expected = (load_file(folder / "last" / "model.safetensors") for folder in (run, reference))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(name.endswith("running_mean") for name in found)


def test_two_ranks_train_and_count_as_one(tmp_path: Path, encoder: Path, scenes: Path) -> None:
    """Without what is drawn for a rank's micro-batch, losses agree; five images of odd sizes are counted once each."""
    curves, evaluations = [], []
    for ranks, stage in ((1, "cpu"), (2, "zero3")):
        folder = tmp_path / f"{ranks}{stage}"
        folder.mkdir()
        recipe = write_recipe(folder, model={"drop_path": 0.0, "dropout": 0.0}, train={"iterations": 3})
        overrides = [f"train.deepspeed={stage}", "run.warmup_checks=false"]
        run_ranks(command(encoder, recipe, scenes, folder / "run", *overrides), ranks)
        curves.append([record["loss"] for record in curve(folder / "run")])
        evaluations.append(read_metrics(folder / "run" / "evaluations.jsonl")[-1])
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert evaluations[1]["images"] == evaluations[0]["images"] == 5
    for key in ("aacc", "miou"):
        assert evaluations[1][key] == pytest.approx(evaluations[0][key], abs=0.1)


def copy(scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenes, tmp_path / "data"))


def paint(path: Path, value: int, size: tuple[int, int] | None = None) -> None:
    with Image.open(path) as mask:
        values = np.full((size or mask.size)[::-1], 1, np.uint8)
    values[0, 0] = value
    Image.fromarray(values).save(path)


IMAGE, MASK = "images/training/scene_00003.jpg", "annotations/validation/scene_00002.png"


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda d: (d / "annotations/training/scene_00003.png").unlink(), r"scene_00003\.jpg: expected a mask"),
        (lambda d: (d / IMAGE).unlink(), r"scene_00003\.png: a mask without an image"),
        (
            lambda d: paint(d / MASK, 1, (7, 9)),
            r"scene_00002\.png: expected the \d+x\d+ pixels of its image, found 7x9",
        ),
        (lambda d: paint(d / MASK, 7), r"scene_00002\.png: expected values from 0 to 6, or 255, found 7"),
        (lambda d: (d / MASK).write_bytes(b"no picture"), r"scene_00002\.png: expected a mask"),
        (lambda d: Image.new("RGB", (30, 30)).save(d / MASK), "mode RGB"),
        (lambda d: (d / IMAGE).write_bytes(b"no picture"), r"scene_00003\.jpg: expected an image"),
        (lambda d: shutil.rmtree(d / "images/validation"), "images/validation: expected a folder"),
        (
            lambda d: [p.unlink() for p in (d / "images/training").iterdir()],
            r"images/training: expected .*, found none",
        ),
        (lambda d: (d / "classes.txt").write_text("one\ntwo\n"), "expected 6 names, found 2; set data.classes=2"),
        (lambda d: shutil.copy(d / IMAGE, (d / IMAGE).with_suffix(".png")), "has the name of scene_00003.jpg"),
    ],
)
def test_bad_data_is_one_line(tmp_path: Path, scenes: Path, change: Callable[[Path], Any], words: str) -> None:
    data = copy(scenes, tmp_path)
    change(data)
    recipe = load_segment_recipe(str(write_recipe(tmp_path)), [f"data.path={data}"])

    def look() -> None:
        for images in open_masked(recipe)[:2]:
            images.check(range(len(images)), 2)

    with pytest.raises(UserError, match=words) as caught:
        look()
    assert "\n" not in str(caught.value)


def test_masks_without_a_class_are_refused(tmp_path: Path, scenes: Path) -> None:
    data = copy(scenes, tmp_path)
    for mask in (data / "annotations/validation").iterdir():
        with Image.open(mask) as image:
            Image.new("L", image.size, 255).save(mask)
    recipe = load_segment_recipe(str(write_recipe(tmp_path)), [f"data.path={data}"])
    ranks = discover_ranks()
    with process_group(ranks), pytest.raises(UserError, match="expected pixels of a class, found none in any"):
        check_masks(open_masked(recipe)[:2], ranks, 2)


def test_values_are_read_as_the_recipe_says(tmp_path: Path) -> None:
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
    Image.new("RGB", (3, 1)).save(tmp_path / "images/training/a.png")
    values = np.array([[0, 1, 255]], np.uint8)
    Image.fromarray(values).save(tmp_path / "annotations/training/a.png")
    palette = Image.fromarray(values, "P")
    palette.putpalette([7] * 768)
    for labels, expected in ((Labels(2, True), [255, 0, 255]), (Labels(2, False), [0, 1, 255])):
        for mask in (Image.fromarray(values), palette):
            mask.save(tmp_path / "annotations/training/a.png")
            images = MaskedImages(tmp_path, "train", labels)
            images.check([0], 1)
            assert np.asarray(images.load(0)[1]).tolist() == [expected]


def test_ade_names(tmp_path: Path) -> None:
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\twall\n2\t0.1\t1\t1\tsky, air\n"
    )
    assert class_names(tmp_path, 2) == ["wall", "sky"]


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["model.width=32"], "expected model.width 32 as in the recipe, found 16"),
        (["model.patch_size=16"], "expected model.patch_size 16"),
        (["model.image_size=36"], "36 is not divisible by the checkpoint's patch side 8; set model.image_size="),
        (["model.layers=[0, 1, 2, 7]"], "model.layers"),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path: Path, encoder: Path, overrides: list[str], words: str) -> None:
    recipe = load_segment_recipe(str(write_recipe(tmp_path)), [f"model.source={encoder}", *overrides])
    with pytest.raises(UserError, match=words):
        start_model(recipe, 6)


def test_another_architecture_is_refused(tmp_path: Path, encoder: Path) -> None:
    """With layer scale, as BEiT's."""
    content = torch.load(encoder, weights_only=True)
    content["model"]["blocks.0.ls1.gamma"] = torch.ones(16)
    torch.save(content, tmp_path / "scaled.pth")
    recipe = load_segment_recipe(str(write_recipe(tmp_path)), [f"model.source={tmp_path / 'scaled.pth'}"])
    with pytest.raises(UserError, match=r"also blocks\.0\.ls1\.gamma"):
        start_model(recipe, 6)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, encoder: Path) -> None:
    content = torch.load(encoder, weights_only=True)
    content["model"]["blocks.1.attn.qkv.weight"][0, 0] = torch.nan
    torch.save(content, tmp_path / "bad.pth")
    recipe = load_segment_recipe(str(write_recipe(tmp_path)), [f"model.source={tmp_path / 'bad.pth'}"])
    with pytest.raises(UserError, match="NaN or infinity"):
        start_model(recipe, 6)


def test_positions_are_interpolated(tmp_path: Path, encoder: Path) -> None:
    recipe = load_segment_recipe(str(write_recipe(tmp_path)), [f"model.source={encoder}", "model.image_size=64"])
    model, _, loaded = start_model(recipe, 6)
    assert loaded.positions == (2, 8)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 6, 16, 16)


def test_refused_command_leaves_nothing(tmp_path: Path, encoder: Path, scenes: Path) -> None:
    data = copy(scenes, tmp_path)
    paint(data / MASK, 9)
    (process,) = start_ranks(command(encoder, write_recipe(tmp_path), data, tmp_path / "run"), 1)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("lut-ds:")]
    assert "scene_00002.png" in line
    assert not (tmp_path / "run").exists()


def test_recipe_is_chosen_by_the_size() -> None:
    assert recipe_for("timm:vit_small_patch16_224", None) == "segment_vits16"
    with pytest.raises(UserError, match=r"width 192, depth 12, patch 16.*segment_vitb16"):
        recipe_for("timm:vit_tiny_patch16_224", None)


@pytest.mark.parametrize("name", sorted(path.stem for path in segment_folder().glob("*.yaml")))
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_segment_recipe(name, ["data.path=images"])
    if name != "segment_demo":
        assert (recipe.train.iterations, recipe.train.global_batch, recipe.stride) == (160_000, 16, 341)
        assert recipe.optim.layer_decay == {1024: 0.75}.get(recipe.model.width or 0, 0.65)


def test_schedule_is_the_published_one() -> None:
    schedule = SegmentSchedule(load_segment_recipe("segment_vitb16", []))
    assert schedule.total_steps == 160_000
    assert schedule.lr(0) == pytest.approx(1e-10)
    assert schedule.lr(750) == pytest.approx(0.5e-4 * (1 - 750 / 160_000), rel=1e-3)
    assert schedule.lr(1500) == pytest.approx(1e-4 * (1 - 1500 / 160_000))
    assert schedule.lr(80_000) == pytest.approx(0.5e-4)


def test_loss_counts_every_pixel_and_learns_of_labelled_ones() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    masks[0, 0, 0] = 2
    loss = pixel_loss(logits, masks)
    expected = -torch.log_softmax(logits[0, :, 0, 0], 0)[2] / 32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[1].abs().sum() == 0


@pytest.mark.parametrize(
    "override,words",
    [
        ("optim.layer_decy=0.5", "did you mean optim.layer_decay"),
        ("data.stride=600", "windows would leave gaps"),
        ("optim.warmup_steps=160000", "is not below train.iterations"),
        ("data.scale=[2.0, 0.5]", "swap them"),
        ("train.epochs=3", "unknown key train.epochs"),
    ],
)
def test_recipe_errors(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_segment_recipe("segment_vitb16", [override])
