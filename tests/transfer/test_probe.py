"""Frozen features: cached, shared by ranks, and worth the same through timm; the probes over them."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from lut_ds.data.sources import open_source
from lut_ds.engine.launch import Ranks
from lut_ds.transfer import features as features_module
from lut_ds.transfer.classifier import make_classifier
from lut_ds.transfer.export import export_timm
from lut_ds.transfer.features import Compute, Features, extract
from lut_ds.transfer.linear import Head, LinearProbe, Protocol, evaluate_head
from lut_ds.transfer.models import load_model
from lut_ds.transfer.probe import Sweep, probe_features, split
from tests.engine.launching import run_ranks
from tests.transfer.runs import lut_ds

ALONE = Ranks(0, 1, 0, torch.device("cpu"), "none")


@pytest.fixture(scope="module")
def subject(lut_run):
    return load_model(lut_run), open_source(str(lut_run / "data"), "val")


def test_features_are_computed_once_and_taken_up_again(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "CHUNK", 100)
    model, val = subject
    first = extract(model, "mean", val, "val", tmp_path, Compute(ALONE, threads=2))
    assert first.computed == len(val) == len(first.values) > 300
    chunks = sorted(tmp_path.glob("*/chunk_*.safetensors"))
    assert len(chunks) == -(-len(val) // 100)
    chunks[1].unlink()
    chunks[2].write_bytes(chunks[2].read_bytes()[:-7])
    again = extract(model, "mean", val, "val", tmp_path, Compute(ALONE, batch_size=17, threads=2))
    assert again.computed == 200
    torch.testing.assert_close(again.values, first.values, atol=1e-5, rtol=0)
    assert extract(model, "mean", val, "val", tmp_path, Compute(ALONE)).computed == 0
    assert extract(model, "cls", val, "val", tmp_path, Compute(ALONE)).computed == len(val)
    assert again.labels.tolist() == [val.label(i) for i in range(len(val))]


def test_two_ranks_find_what_one_finds(lut_run, tmp_path):
    options = ("--k", "1,7", "--json", "--cache", str(tmp_path / "cache2"), "-o", str(tmp_path / "two"))
    ranks = run_ranks([sys.executable, "-m", "lut_ds", "knn", str(lut_run), *options], 2, DS_ACCELERATOR="cpu")
    two = json.loads(ranks[0][0])
    one = json.loads(
        lut_ds("knn", str(lut_run), "--k", "1,7", "--json", "-o", "one", "--cache", "c", cwd=tmp_path).stdout
    )
    assert two["computed"] == one["computed"] == one["images"]
    assert two["top1"] == one["top1"]
    assert ranks[1][0] == ""


def test_a_separable_set_is_learned_and_the_head_is_that_of_raw_features():
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(6, 8, generator=generator)
    labels = torch.arange(600) % 6
    values = 5 + 40 * (centres[labels] + 0.3 * torch.randn(600, 8, generator=generator))
    train, val = (values[:400], labels[:400]), (values[400:], labels[400:])
    found, head = probe_features(train, val, list("abcdef"), Sweep(epochs=10), ALONE)
    assert found["top1"] > 97
    logits = torch.nn.functional.linear(val[0], head["head.weight"], head["head.bias"])
    assert 100 * (logits.argmax(1) == val[1]).double().mean().item() == pytest.approx(found["top1"])
    assert found["top1"] == pytest.approx(np.mean(list(found["per_class"].values())), abs=2)
    shuffled = (values[:400], labels[:400][torch.randperm(400, generator=generator)])
    assert probe_features(shuffled, val, list("abcdef"), Sweep(epochs=10), ALONE)[0]["top1"] < 50


def test_the_held_out_images_are_some_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 1 + [3] * 20)
    kept, aside = split(labels, 0.1, seed=1)
    assert sorted([*kept.tolist(), *aside.tolist()]) == list(range(74))
    assert torch.bincount(labels[aside], minlength=4).tolist() == [5, 0, 0, 2]


def timm_top1(lut_run, out, head_file, folder):
    """Top-1 of an exported encoder with a head, with timm's model, timm's transform and PIL alone."""
    export_timm(lut_run, "ema", out)
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    head = load_file(head_file)
    model.reset_classifier(len(head["head.bias"]))
    assert not model.load_state_dict(head, strict=False).unexpected_keys
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    classes = sorted(p.name for p in folder.iterdir())
    files = [(p, i) for i, name in enumerate(classes) for p in sorted((folder / name).iterdir())]
    with torch.no_grad():
        logits = model.eval()(torch.stack([transform(Image.open(p).convert("RGB")) for p, _ in files]))
    return 100 * (logits.argmax(1) == torch.tensor([i for _, i in files])).double().mean().item()


def test_the_quick_probe_is_worth_the_same_through_timm(lut_run, tmp_path):
    done = lut_ds("probe", str(lut_run), "--epochs", "20", "-o", "out", "--cache", "c", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    direct = timm_top1(lut_run, tmp_path / "export", tmp_path / "out" / "head.safetensors", lut_run / "data" / "val")
    assert results["top1"] == pytest.approx(direct, abs=0.3)  # an image on the edge may fall on either side
    assert results["top1"] > 40
    assert results["top5"] > results["top1"]


def probe(subject, lut_run, folder, epochs):
    model, val = subject
    compute = Compute(ALONE, threads=2)
    queries = extract(model, "mean", val, "val", folder.parent / "cache", compute)
    train = open_source(str(lut_run / "data"), "train")
    protocol = Protocol(epochs=epochs, batch=288, warmup_epochs=1)
    return LinearProbe(model, "mean", train, queries, protocol, folder, compute), queries, train


def test_maes_probe_learns_and_goes_on_where_it_was_stopped(subject, lut_run, tmp_path, monkeypatch):
    whole, queries, train = probe(subject, lut_run, tmp_path / "whole", 4)
    straight = whole.run()
    found, _ = evaluate_head(straight.head, queries, train.classes)
    assert found["top1"] == pytest.approx(straight.history[-1]["top1"])
    assert straight.history[-1]["loss"] < straight.history[0]["loss"]
    stops = iter([None, None, "SIGTERM"])
    first = probe(subject, lut_run, tmp_path / "cut", 4)[0]
    monkeypatch.setattr(first, "_stop", lambda request: next(stops))
    cut = first.run()
    assert (cut.stopped_by, cut.step) == ("SIGTERM", 3)
    resumed = probe(subject, lut_run, tmp_path / "cut", 4)[0].run()
    assert (resumed.stopped_by, resumed.step) == (None, straight.step)
    for name, value in straight.head.state_dict().items():
        assert torch.equal(value, resumed.head.state_dict()[name]), name
    assert resumed.history == straight.history


@pytest.mark.parametrize("width, epochs", [(384, 90), (768, 90), (1024, 50), (1280, 50)])
def test_maes_probe_is_as_long_as_published_for_the_size(width, epochs, subject, lut_run, tmp_path):
    sizes = {"image_size": 32, "patch_size": 8, "depth": 1, "heads": 8, "mlp_ratio": 1.0, "classes": 2}
    wide = replace(subject[0], model=make_classifier(**sizes, width=width))
    train = open_source(str(lut_run / "data"), "train")
    val = Features(torch.zeros(1, width), torch.zeros(1, dtype=torch.int64), 1)
    for given, expected in ((None, epochs), (7, 7)):
        probe = LinearProbe(wide, "cls", train, val, Protocol(given, batch=144), tmp_path, Compute(ALONE))
        assert probe.epochs == expected


def test_the_folded_head_is_batch_norm_and_linear():
    head = Head(5, 3, seed=0)
    x = 4 + 3 * torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    head(x)
    layer = head.eval().folded()
    with torch.no_grad():
        expected = head(x)
    torch.testing.assert_close(x @ layer["head.weight"].T + layer["head.bias"], expected, atol=1e-5, rtol=1e-5)


def test_a_probe_that_does_not_fit_is_named(lut_run, tmp_path):
    options = ("probe", str(lut_run), "--protocol", "mae", "-o", "out", "--cache", "c")
    done = lut_ds(*options, cwd=tmp_path)
    assert done.returncode == 2
    assert "--batch: expected a multiple of 1 ranks and at most the 1442 training images, found 16384" in done.stderr
    assert not (tmp_path / "c").exists(), "said before anything is computed"
