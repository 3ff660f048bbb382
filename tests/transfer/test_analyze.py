"""`lut-ds analyze` on a tiny run: every analysis, alone and beside another model, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lut_ds.analysis import attention_distance
from lut_ds.cli import main
from lut_ds.data.sources import open_source
from lut_ds.report import report
from lut_ds.transfer import analyze as module
from lut_ds.transfer.analyze import DRAWINGS, spread
from lut_ds.transfer.export import export_timm
from lut_ds.transfer.models import load_model

FEW = ("--images", "24", "--train-images", "80", "--threads", "1")


@pytest.fixture
def analyze(capfd):
    def call(*arguments, code=0):
        assert main(["analyze", *map(str, arguments)]) == code
        return capfd.readouterr()

    return call


def refused(analyze, *arguments):
    done = analyze(*arguments, code=2)
    assert done.out == ""
    (line,) = [line for line in done.err.splitlines() if line.strip()]
    return line


def test_two_runs_side_by_side(lut_run, mae_run, analyze, tmp_path):
    out = tmp_path / "out"
    found = json.loads(analyze(lut_run, mae_run, "--data", lut_run / "data", "-o", out, "--json", *FEW).out)
    names = ["demo", "run"]
    assert list(found["models"]) == names
    assert list(found["analyses"]) == list(DRAWINGS)
    assert found["images"] == 24
    for name, each in found["analyses"].items():
        assert list(each) == [*names, "between"] if name == "cka" else names
        record = json.loads((out / f"{name}.json").read_text())
        assert record["found"] == each
        assert record["models"]["demo"]["weights"] == found["models"]["demo"]["weights"]
        grounds = [Image.open(out / f"{name}{end}.png").convert("RGB").getpixel((0, 0)) for end in ("", "-dark")]
        assert min(grounds[0]) > 200 > 60 > max(grounds[1])
    assert sorted(p.suffix for p in out.iterdir()) == [".json"] * 6 + [".png"] * 12
    layers = found["analyses"]["layers"]["demo"]
    assert len(layers["top1"]) == 3
    assert layers["images"] == {"train": 80, "val": 24}


def test_two_runs_have_the_files_in_both_and_one_figure_in_their_report(lut_run, mae_run, analyze, tmp_path):
    first, second = shutil.copytree(lut_run, tmp_path / "first"), shutil.copytree(mae_run, tmp_path / "second")
    options = ("--only", "spectrum", "--data", lut_run / "data", "--json", *FEW)
    found = json.loads(analyze(first, second, *options).out)
    assert found["outputs"] == [
        str(first / "evaluations" / "analysis_with_second"),
        str(second / "evaluations" / "analysis_with_first"),
    ]
    files = [sorted(p.name for p in Path(folder).iterdir()) for folder in found["outputs"]]
    assert files == [["spectrum-dark.png", "spectrum.json", "spectrum.png"]] * 2
    for runs, count in (((first, second), 1), ((second,), 1)):
        page = Path(report(list(map(str, runs)), str(tmp_path / "page.html"))["file"]).read_text()
        assert page.count("Singular values: first and second") == count
    steps = sorted((first / "checkpoints").glob("step_*"))[:2]
    outputs = module._outputs(module.Request(str(steps[0])), str(steps[1]), [step.name for step in steps])
    assert outputs == (first / "evaluations" / f"analysis_with_{steps[1].name}",), "both are of one run"


def test_one_run_into_its_own_folder_with_its_own_data(lut_run, analyze, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(lut_run, run)
    text = analyze(run, "--student", "--only", "attention-distance", *FEW).out
    record = json.loads((run / "evaluations" / "analysis_student" / "attention-distance.json").read_text())
    assert record["models"]["copy"]["kind"] == "student"
    model = load_model(lut_run, "student")
    val = open_source(str(lut_run / "data"), "val")
    request = module.Request(str(run))
    scene = module.Scene(request, {"copy": model}, None, val, (spread(None, 9), spread(val, 24)), (tmp_path,))
    with module.computing(threads=1) as compute:
        direct = attention_distance.measure(module._subject("copy", model, scene, compute))
    assert record["found"]["copy"] == direct.numbers
    assert f"{direct.numbers['by_layer'][0]:.1f} px in the first layer" in text


def test_samples_are_spread_over_the_classes(lut_run):
    val = open_source(str(lut_run / "data"), "val")
    chosen = spread(val, 50)
    assert len(chosen) == len(set(chosen.tolist())) == 50
    assert np.bincount([val.label(i) for i in chosen.tolist()]).min() >= 4
    assert len({val.label(i) for i in chosen[:8].tolist()}) > 3  # what figures show
    assert sorted(spread(val, 10**6).tolist()) == list(range(len(val)))
    assert len(spread(None, 5)) == 0


def test_two_of_one_name_and_another_resolution(lut_run, analyze, tmp_path):
    export_timm(lut_run, "student", tmp_path / "demo")
    out = tmp_path / "out"
    options = ("--only", "spectrum,cka", "--image-size", "48", "-o", out, "--json", *FEW)
    found = json.loads(analyze(lut_run, tmp_path / "demo", "--data", lut_run / "data", *options).out)
    assert list(found["models"]) == ["runs/demo", f"{tmp_path.name}/demo"]
    assert [m["image_size"] for m in found["models"].values()] == [48, 48]


@pytest.fixture
def unlabelled(tmp_path):
    (tmp_path / "flat" / "val").mkdir(parents=True)
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / "val" / f"{k}.png")
    return tmp_path / "flat"


def test_labels_are_needed_by_layers_alone(lut_run, unlabelled, analyze, tmp_path):
    out = tmp_path / "out"
    found = json.loads(analyze(lut_run, "--data", unlabelled, "--only", "relevance", "-o", out, "--json", *FEW).out)
    assert found["analyses"]["relevance"]["demo"]["target"] == "norm"
    line = refused(analyze, lut_run, "--data", unlabelled, "--only", "layers", "-o", tmp_path / "other")
    assert "leave `layers` out" in line
    assert not (tmp_path / "other").exists()


def test_bad_input_is_one_line(lut_run, analyze, tmp_path):
    out = ("-o", tmp_path / "out", *FEW)
    assert "--only: expected some of attention-distance" in refused(analyze, lut_run, "--only", "spectra", *out)
    assert "found none" in refused(analyze, lut_run, "--only", ",", *out)
    assert "multiple of the patch side 8, found 30" in refused(analyze, lut_run, "--image-size", "30", *out)
    assert "found timm's ResNet" in refused(analyze, "timm:resnet10t", "--data", lut_run / "data", *out)
    assert "nothing there" in refused(analyze, lut_run, tmp_path / "nothing", *out)
    assert "--data" in refused(analyze, "timm:vit_tiny_patch16_224", *out)
    assert "--batch-size: cka needs at least 4 images, found 3" in refused(analyze, lut_run, "--batch-size", "3", *out)
    assert "--images: cka needs at least 4 images, found 3" in refused(analyze, lut_run, *out, "--images", "3")
    (tmp_path / "file").write_text("")
    assert "found a file" in refused(analyze, lut_run, "-o", tmp_path / "file", "--only", "maps")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(lut_run, analyze, tmp_path):
    export_timm(lut_run, "ema", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["blocks.1.mlp.fc1.weight"][3, 2] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors")
    line = refused(analyze, tmp_path / "broken", "--data", lut_run / "data", "-o", tmp_path / "out")
    assert "blocks.1.mlp.fc1.weight" in line
    assert torch.isnan(weights["blocks.1.mlp.fc1.weight"]).sum() == 1
