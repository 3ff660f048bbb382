"""`lut-ds robustness` as a whole: from checkpoints with and without a classifier to numbers that other code finds too."""

import csv
import json
import os
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from lut_ds.cli import main
from lut_ds.config import Model
from lut_ds.data.loader import EvalLoader
from lut_ds.data.sources import open_source
from lut_ds.transfer.classifier import make_classifier
from lut_ds.transfer.evaluate import Request, evaluate_quick
from lut_ds.transfer.export import classifier_config, write_timm
from lut_ds.transfer.probe import Sweep
from lut_ds.transfer.robustness.corruptions import corrupt
from lut_ds.transfer.robustness.plan import Wanted
from lut_ds.transfer.robustness.run import evaluate_robustness
from tests.engine.launching import run_ranks

SIZES = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
SOME = Wanted(corruptions=("fog", "gaussian_noise", "spatter"), severities=(1, 5), ratios=(0.5,), grids=(2,), limit=90)


@pytest.fixture(scope="module")
def data(lut_run):
    return str(lut_run / "data")


@pytest.fixture(scope="module", params=["mean", "cls"])
def fine_tuned(request, tmp_path_factory, data):
    """A folder as `lut-ds finetune` leaves it, of a classifier with random weights."""
    torch.manual_seed(1)
    model = make_classifier(**SIZES, mlp_ratio=4.0, classes=10, pool=request.param, head_std=1.0)
    folder = tmp_path_factory.mktemp("finetuned") / request.param
    classes = open_source(data, "val").classes
    sizes = Model(**SIZES, mlp_ratio=4.0)
    about = {"recipe": {"data": {"path": data}}}
    write_timm(folder / "best", classifier_config(sizes, request.param, classes, about), model.state_dict())
    (folder / "checkpoints").mkdir()
    return folder


def request(source, data, output, **changes):
    return Request(str(source), data=data, output=str(output), cache=str(output / "features"), threads=2, **changes)


def predictions_of_timm(model, paths, alter=lambda image, i: image):
    """Classes, with timm's own transform, one image at a time; `alter` takes the cropped bytes."""
    config = resolve_model_data_config(model)
    *crop, _, _ = create_transform(**config, is_training=False).transforms
    mean, std = (torch.tensor(config[key]) for key in ("mean", "std"))
    found = []
    for i, path in paths:
        image = Image.open(path).convert("RGB")
        for step in crop:
            image = step(image)
        pixels = torch.from_numpy(np.array(alter(np.asarray(image), i))).float() / 255
        with torch.inference_mode():
            found.append(int(model(((pixels - mean) / std).permute(2, 0, 1)[None]).argmax()))
    return found


def test_a_classifier_is_worth_the_same_through_timm(fine_tuned, data, tmp_path):
    wanted = Wanted(sets=("clean", "c"), corruptions=("gaussian_noise", "pixelate"), severities=(3,))
    found = evaluate_robustness(request(fine_tuned, data, tmp_path), wanted)
    assert found["classifier"]["head"] == "own"
    model = timm.create_model(f"local-dir:{fine_tuned / 'best'}", pretrained=True).eval()
    val = open_source(data, "val")
    paths = [(i, val.name(i)) for i in range(len(val))]
    labels = np.array([val.label(i) for i in range(len(val))])

    def top1(alter):
        return 100 * (np.array(predictions_of_timm(model, paths, alter)) == labels).mean()

    one = 100 / len(val)  # an image on the edge between two classes may fall on either side
    assert found["sets"]["clean"]["top1"] == pytest.approx(top1(lambda x, i: x), abs=1.01 * one)
    for name in ("gaussian_noise", "pixelate"):
        expected = top1(lambda x, i, name=name: corrupt(x, name, 3, 0, i))
        assert found["corruptions"]["top1"][name]["3"] == pytest.approx(expected, abs=0.6), "DALI's and PIL's decoders"


def test_a_fine_tuning_is_tested_on_its_own_data(fine_tuned, data, tmp_path):
    for source in (fine_tuned, fine_tuned / "best"):
        asked = Request(str(source), output=str(tmp_path / source.name), threads=2)
        found = evaluate_robustness(asked, Wanted(sets=("clean",), limit=20))
        assert (found["data"], found["sets"]["clean"]["images"]) == (os.path.abspath(data), 20)


def test_an_encoder_gets_the_probe_of_lut_ds_probe(lut_run, data, tmp_path):
    found = evaluate_robustness(request(lut_run, data, tmp_path), Wanted(sets=("clean",)))
    probed = evaluate_quick(request(lut_run, data, tmp_path / "probe"), Sweep())
    assert found["sets"]["clean"]["top1"] == probed["top1"] > 50
    assert found["classifier"]["chosen"] == probed["chosen"]


@pytest.fixture(scope="module")
def measured(lut_run, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("measured") / "out"
    return output, evaluate_robustness(request(lut_run, data, output), SOME)


def test_result_files(measured):
    output, found = measured
    assert json.loads((output / "results.json").read_text()) == found
    assert found["measured"] == 1 + 6 + 2 + 1
    assert list(found["corruptions"]["top1"]) == ["gaussian_noise", "fog", "spatter"]
    assert found["corruptions"]["images"] == "computed"
    errors = [100 - np.mean(list(found["corruptions"]["top1"][n].values())) for n in ("gaussian_noise", "fog")]
    assert found["corruptions"]["mean_error"] == pytest.approx(np.mean(errors)), "spatter is extra"
    assert found["corruptions"]["mce"] is None
    assert set(found["occlusion"]) == {"random", "salient"}
    rows = list(csv.DictReader((output / "results.csv").open()))
    assert (
        float(next(r["top1"] for r in rows if r["which"] == "fog" and r["value"] == "5"))
        == (found["corruptions"]["top1"]["fog"]["5"])
    )
    assert "| gaussian noise |" in (output / "results.md").read_text()
    assert 1000 < Image.open(output / "robustness.png").size[0] < 1500, "wider, its words could not be read on a page"


def test_a_stopped_run_continues(measured, lut_run, data):
    output, found = measured
    lines = (output / "measured.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 10
    (output / "measured.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:30])
    again = evaluate_robustness(request(lut_run, data, output), SOME)
    assert again.pop("measured") == 3
    assert again == {key: value for key, value in found.items() if key != "measured"}
    assert evaluate_robustness(request(lut_run, data, output), SOME)["measured"] == 0
    other = evaluate_robustness(request(lut_run, data, output, kind="student"), SOME)
    assert other["measured"] == 10, "of other weights nothing is taken"


@pytest.mark.slow
def test_two_ranks_count_every_image_once(measured, lut_run, data, tmp_path):
    options = ["--corruptions", "fog,gaussian_noise,spatter", "--severities", "1,5", "--ratios", "0.5", "--grids", "2"]
    where = ["--data", data, "-o", str(tmp_path / "out"), "--cache", str(measured[0] / "features"), "--threads", "1"]
    command = [sys.executable, "-m", "lut_ds", "robustness", str(lut_run), *options, *where, "--limit", "89", "--json"]
    two = json.loads(run_ranks(command, 2, DS_ACCELERATOR="cpu")[0][0])
    one = evaluate_robustness(request(lut_run, data, tmp_path / "one"), Wanted(**{**vars(SOME), "limit": 89}))
    assert two["sets"]["clean"]["images"] == 89
    for key in ("sets", "corruptions", "occlusion", "shuffle"):
        assert two[key] == one[key]


def test_downloaded_corruptions_are_taken_as_they_are(lut_run, data, tmp_path):
    """Files that hold what would be computed, in the folders of an archive, give the numbers of what is computed."""
    val = open_source(data, "val")
    wanted = Wanted(sets=("c",), corruptions=("contrast",), severities=(2,))
    computed = evaluate_robustness(request(lut_run, data, tmp_path / "a"), wanted)
    pixels = torch.cat([batch for batch, _ in EvalLoader(val, 32, 128, 2)]).numpy()
    for i, image in enumerate(pixels):
        folder = tmp_path / "imagenet-c" / "digital" / "contrast" / "2" / val.classes[val.label(i)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(corrupt(image, "contrast", 2, 0, i)).save(folder / f"{i:05d}.png")
    there = Wanted(**{**vars(wanted), "folders": {"c": str(tmp_path / "imagenet-c")}})
    found = evaluate_robustness(request(lut_run, data, tmp_path / "b"), there)
    assert found["corruptions"]["images"] == "downloaded"
    assert found["corruptions"]["top1"] == computed["corruptions"]["top1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sets clean,imagenet", "--sets: expected some of clean, c, occlusion"),
        ("--corruptions fog,rain", "--corruptions: expected some of gaussian_noise"),
        ("--severities 1,6", "--severities: expected some of 1, 2, 3, 4, 5, found 6"),
        ("--ratios 0.5,1.5", "--ratios: expected shares above 0 and below 1, found 1.5"),
        ("--ratios half", "--ratios: expected numbers"),
        ("--grids 3", "--grids: expected divisors of 32 pixels from 2 to 4 patches, found 3"),
        ("--seed -1", "--seed: expected a number from 0"),
        ("--sets a", "expected imagenet-a in it, found none"),
        ("--sets a=/nowhere", "a: expected a checkpoint with ImageNet's 1000 classes, found one with 10"),
        ("--sets clean=/somewhere", "clean is made of DATA/val, found a folder for it"),
        ("--sets c=/nowhere", "expected gaussian_noise/1 in it, found none"),
    ],
)
def test_what_cannot_work_is_one_line(options, message, lut_run, data, tmp_path, capfd):
    command = ["robustness", str(lut_run), "--data", data, "-o", str(tmp_path / "out"), *options.split()]
    assert main(command) == 2
    error = capfd.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("012", "expected the 10 classes of the checkpoint, found 3"),
        ("012345678x", "expected the classes of the checkpoint ('0'...), found 'x' (1 unknown)"),
    ],
)
def test_data_of_other_classes_are_one_line(names, message, fine_tuned, tmp_path, capfd):
    for name in names:
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "data" / "val" / name / "a.png")
    assert main(["robustness", str(fine_tuned), "--data", str(tmp_path / "data"), "-o", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
