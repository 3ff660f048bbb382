"""Models from every layout of file give timm's own features, and what does not fit is named in one line."""

import argparse

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from lut_ds.errors import UserError
from lut_ds.method.lut import encode_views, pool
from lut_ds.transfer.export import export_timm
from lut_ds.transfer.layouts import load_safely
from lut_ds.transfer.load import find_checkpoint, load_encoder
from lut_ds.transfer.models import load_model

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(seed: int = 0, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model("vit_base_patch16_224", **{**SIZES, "num_classes": 0, **changes}).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def images(side: int = 32):
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(5))


def named(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def contents(student, average):
    """What the published codes save, by layout."""
    s, a = student.state_dict(), average.state_dict()
    head = {"head.mlp.0.weight": torch.ones(4, 32)}
    moco = {**named("module.base_encoder.", {**s, **head}), **named("module.momentum_encoder.", {**a, **head})}
    masked = {"masked_embed": torch.zeros(1, 32)}
    return {
        "moco_v3": {
            "epoch": 300,
            "arch": "vit_small",
            "state_dict": {**moco, "module.predictor.0.weight": torch.ones(2)},
        },
        "dino": {
            "student": named("module.", {**named("backbone.", s), **head}),
            "teacher": {**named("backbone.", a), **head},
            "args": argparse.Namespace(arch="vit_small"),
        },
        "ibot": {
            "student": named("module.", {**named("backbone.", {**s, **masked}), **head}),
            "teacher": {**named("backbone.", {**a, **masked}), **head},
        },
        "lut": {"model": {**s, "mask_token": torch.zeros(1, 1, 8)}, "model_ema": named("ema.", a), "epoch": 7},
    }


@pytest.mark.parametrize("layout", ["moco_v3", "dino", "ibot", "lut"])
@pytest.mark.parametrize("kind", ["student", "ema", None])
def test_published_layouts_give_timms_features(layout, kind, tmp_path):
    models = {"student": vit(1), "ema": vit(2)}
    file = tmp_path / "checkpoint.pth"
    torch.save(contents(models["student"], models["ema"])[layout], file)
    found = load_model(file, kind, heads=2)
    expected = models[kind or "ema"]
    with torch.no_grad():
        tokens = expected.forward_features(images())
        torch.testing.assert_close(found.features(images(), "mean"), tokens[:, 1:].mean(1), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.features(images(), "cls"), tokens[:, 0], atol=1e-5, rtol=0)
    assert (found.record["format"], found.record["kind"]) == (layout, kind or "ema")
    of_student = kind == "student"
    left = {
        "moco_v3": {"head": 1, "predictor": 1, "momentum_encoder" if of_student else "base_encoder": 31},
        "dino": {"head": 1, "teacher" if of_student else "student": 31},
        "ibot": {"head": 1, "masked_embed": 1, "teacher" if of_student else "student": 32},
        "lut": {"mask_token": 1, "model_ema": 30} if of_student else {"model": 31},
    }[layout]
    assert found.record["left_out"] == left


@pytest.mark.parametrize("prefix", ["backbone.", "module._orig_mod.", "model.", "_orig_mod.module."])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
def test_an_encoder_alone(wrap, prefix, tmp_path):
    torch.save(wrap(named(prefix, vit().state_dict())), tmp_path / "teacher.pth")
    found = load_model(tmp_path / "teacher.pth", heads=2)
    with torch.no_grad():
        expected = vit().forward_features(images())[:, 0]
        torch.testing.assert_close(found.features(images(), "cls"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["student", "ema", None])
def test_timms_own_training_keeps_an_average(kind, tmp_path):
    """timm's load_checkpoint takes the average where it is not told otherwise."""
    models, file = {"student": vit(1), "ema": vit(2)}, tmp_path / "model_best.pth.tar"
    states = {name: named("module.", model.state_dict()) for name, model in models.items()}
    torch.save({"epoch": 9, "state_dict": states["student"], "state_dict_ema": states["ema"]}, file)
    found = load_model(file, kind, heads=2)
    theirs = vit(3)
    timm.models.load_checkpoint(theirs, str(file), use_ema=kind != "student", weights_only=True)
    with torch.no_grad():
        expected = theirs.forward_features(images())[:, 0]
        torch.testing.assert_close(found.features(images(), "cls"), expected, atol=1e-5, rtol=0)
    assert (found.record["kind"], found.record["epoch"]) == (kind or "ema", 9)
    assert found.record["left_out"] == {"state_dict_ema" if kind == "student" else "state_dict": 30}


def test_moco_v3_small_has_twelve_heads(tmp_path):
    small = vit(embed_dim=384, num_heads=12, depth=1)
    torch.save(contents(small, small)["dino"] | {}, tmp_path / "dino.pth")
    state = named("module.base_encoder.", small.state_dict())
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    assert load_model(tmp_path / "moco.pth", "student").record["sizes"]["heads"] == 12
    assert load_model(tmp_path / "dino.pth", "student").record["sizes"]["heads"] == 6
    state = named("module.", {**small.state_dict(), "head.weight": torch.ones(5, 384), "head.bias": torch.ones(5)})
    torch.save({"epoch": 90, "arch": "vit_small", "state_dict": state}, tmp_path / "linear.pth.tar")
    linear = load_model(tmp_path / "linear.pth.tar")
    assert (linear.record["sizes"]["heads"], linear.record["left_out"]) == (12, {"head": 2})


@pytest.mark.parametrize("kind", ["student", "ema"])
def test_runs_and_exports_are_one_model(kind, lut_run, tmp_path):
    encoder = load_encoder(find_checkpoint(lut_run), kind)
    export_timm(lut_run, kind, tmp_path / "out")
    run, export = load_model(lut_run, kind), load_model(tmp_path / "out")
    with torch.no_grad():
        expected = pool(encode_views(encoder, [images()], None))
        for found in (run, export):
            torch.testing.assert_close(found.features(images(), "mean"), expected, atol=1e-5, rtol=0)
    assert run.record["weights"] == export.record["weights"]
    assert (export.record["kind"], export.record["step"]) == (kind, run.record["step"])


def test_timm_names_with_and_without_a_file(tmp_path):
    bare = load_model("timm:vit_tiny_patch16_224", image_size=32)
    assert bare.record["random"]
    assert bare.mean == (0.5, 0.5, 0.5)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    found = load_model(f"timm:vit_tiny_patch16_224:{tmp_path / 'tiny.pth'}", image_size=48)
    model.set_input_size(img_size=(48, 48))
    with torch.no_grad():
        expected = model.forward_features(images(48))[:, 0]
        torch.testing.assert_close(found.features(images(48), "cls"), expected, atol=1e-5, rtol=0)
    assert (found.record["left_out"], found.record["resized_from"], found.record["random"]) == ({"head": 2}, 224, False)


def test_tokens_of_a_distilled_model_come_from_its_file(tmp_path):
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2).eval()
    torch.save(model.state_dict(), tmp_path / "file.pth")
    found = load_model(f"timm:deit_tiny_distilled_patch16_224:{tmp_path / 'file.pth'}")
    with torch.no_grad():
        expected = model.forward_features(images(224))
        torch.testing.assert_close(found.model.forward_features(images(224)), expected, atol=1e-5, rtol=0)
    assert found.record["left_out"] == {"head": 2, "head_dist": 2}


def test_weights_that_timm_publishes(tmp_path, monkeypatch):
    """From a cache as a download leaves it: no network is asked."""
    published = timm.create_model("test_vit.r160_in1k").eval()
    commit = tmp_path / "models--timm--test_vit.r160_in1k" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    save_file(published.state_dict(), commit / "model.safetensors")
    (commit.parent.parent / "refs").mkdir()
    (commit.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(timm.models._hub, "_DEFAULT_HUB_CACHE", None, raising=False)
    with pytest.raises(UserError, match=r"no weights in timm's cache.*name the file: timm:test_vit:FILE"):
        load_model("timm:test_vit.r160_in1k")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = load_model("timm:test_vit.r160_in1k")
    assert not found.record["random"]
    assert found.record["left_out"] == {"head": 2}
    assert torch.equal(found.head["head.weight"], published.head.weight)
    with torch.no_grad():
        expected = published.forward_features(images(160))
        torch.testing.assert_close(found.model.forward_features(images(160)), expected, atol=1e-5, rtol=0)


def poisoned():
    state = vit().state_dict()
    state["blocks.1.attn.qkv.weight"][0, 0] = torch.nan
    return state


@pytest.mark.parametrize("zipped", [True, False])
def test_a_changed_byte_is_one_line_or_does_not_matter(zipped, tmp_path):
    """torch's reader answers damage with errors of any kind."""
    file = tmp_path / "file.pth"
    state = {"model": {"a.b": torch.ones(2)}, "args": argparse.Namespace(a=1), "epoch": 3}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    whole, random = file.read_bytes(), np.random.default_rng(0)
    refused = []
    for _ in range(300):
        content = bytearray(whole)
        content[random.integers(min(len(content), 900))] = random.integers(256)
        file.write_bytes(content)
        try:
            load_safely(file)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert not [text for text in refused if "\n" in text]


def without(name):
    return {k: v for k, v in vit().state_dict().items() if k != name}


@pytest.mark.parametrize(
    "state, words",
    [
        (poisoned, "NaN or infinity in blocks.1.attn.qkv.weight"),
        (lambda: without("blocks.1.mlp.fc2.bias"), "found none of blocks.1.mlp.fc2.bias"),
        (lambda: without("pos_embed"), "no pos_embed"),
        (lambda: {**vit().state_dict(), "norm.bias": torch.zeros(32).to_sparse()}, "something else at norm.bias"),
        (lambda: {**vit().state_dict(), "norm.bias": torch.zeros(32) * 1j}, "something else at norm.bias"),
        (
            lambda: {"conv1.weight": torch.ones(3), "fc.bias": torch.ones(3)},
            "expected a Vision Transformer, found conv1",
        ),
        (lambda: {**vit().state_dict(), "blocks.0.ls1.gamma": torch.ones(32)}, "also blocks.0.ls1.gamma"),
    ],
)
def test_what_does_not_fit_is_one_line(state, words, tmp_path):
    torch.save(state(), tmp_path / "file.pth")
    with pytest.raises(UserError, match=words) as caught:
        load_model(tmp_path / "file.pth", heads=2)
    assert "file.pth" in str(caught.value)


@pytest.mark.parametrize(
    "source, words",
    [
        ("timm:resnet18", "expected a Vision Transformer, found timm's ResNet"),
        ("timm:vit_tiny_patch16_225", r"timm cannot make.*it has vit_tiny_"),
        ("timm:no_such_model", r"timm cannot make.*it has vit_small"),
        ("timm:vit_pwee_patch16_reg1_gap_256", "of attention, then MLP, found timm's ParallelScalingBlock"),
        ("timm:vit_tiny_patch16_224:none.pth", "no such file"),
        ("nowhere", "nothing there"),
    ],
)
def test_sources_that_are_none(source, words):
    with pytest.raises(UserError, match=words):
        load_model(source)


def test_a_token_of_a_convolutional_stem_is_as_large_as_its_cell():
    """timm calls its patch side 8: it is counted on the stem's map."""
    found = load_model("timm:vit_tiny_r_s16_p8_224")
    assert found.record["sizes"]["patch_size"] == 32
    with pytest.raises(UserError, match="multiple of the patch side 32, found 232"):
        load_model("timm:vit_tiny_r_s16_p8_224", image_size=232)


def test_a_segmenter_is_told_from_a_damaged_export(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"segmenter": {"classes": ["a", "b"]}}')
    with pytest.raises(UserError, match="expected an encoder or a classifier, found a segmenter"):
        load_model(tmp_path)


def test_another_architecture_and_another_side(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"width 192.*tensors differ"):
        load_model(f"timm:vit_tiny_patch16_224:{tmp_path / 'file.pth'}")
    with pytest.raises(UserError, match="multiple of the patch side 8, found 33"):
        load_model(tmp_path / "file.pth", image_size=33, heads=2)
    with pytest.raises(UserError, match="--heads N"):
        load_model(tmp_path / "file.pth")
