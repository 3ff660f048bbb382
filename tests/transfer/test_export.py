import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from lut_ds.config import Model
from lut_ds.errors import UserError
from lut_ds.method.encoder import Encoder
from lut_ds.method.lut import pool
from lut_ds.transfer.export import (
    ARCHITECTURES,
    classifier_config,
    export_timm,
    timm_architecture,
    timm_config,
    write_timm,
)
from lut_ds.transfer.interchange import export
from lut_ds.transfer.load import find_checkpoint, load_encoder
from lut_ds.transfer.models import load_model


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(model, images):
    return model.eval().forward_features(images)


@pytest.mark.parametrize("kind", ["student", "ema"])
def test_timm_loads_the_file_strictly_with_equal_features(lut_run, images, tmp_path, kind):
    result = export_timm(lut_run, kind, tmp_path / "out")
    assert (result["kind"], result["step"]) == (kind, 30)
    expected = features(load_encoder(find_checkpoint(lut_run), kind), images)
    by_path = timm.create_model(
        result["architecture"], checkpoint_path=result["weights"], num_classes=0, **result["model_args"]
    )
    torch.testing.assert_close(features(by_path, images), expected, atol=1e-5, rtol=1e-5)
    by_line = eval(result["load"], {"timm": timm})
    assert torch.equal(features(by_line, images), features(by_path, images))


def test_timm_builds_the_folder_with_our_pooling_and_normalisation(lut_run, images, tmp_path):
    export_timm(lut_run, "ema", tmp_path / "out")
    encoder = load_encoder(find_checkpoint(lut_run), "ema")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), pool(encoder.forward_features(images)), atol=1e-5, rtol=1e-5)
    data = timm.data.resolve_data_config({}, model=model)
    assert data["mean"] == [0.485, 0.456, 0.406]
    assert data["std"] == [0.229, 0.224, 0.225]
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert data["interpolation"] == "bicubic"


def test_timm_adds_a_fresh_head_and_resamples_positions(lut_run, tmp_path):
    export_timm(lut_run, "ema", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7, img_size=48)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 7)


def test_timms_default_head_is_refused_by_name(lut_run, tmp_path):
    """Documented in export_timm: a headless file needs num_classes=0."""
    result = export_timm(lut_run, "ema", tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
        timm.create_model(result["architecture"], checkpoint_path=result["weights"], **result["model_args"])


def test_the_export_says_where_it_comes_from(lut_run, tmp_path):
    result = export_timm(lut_run, "student", tmp_path / "out")
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["lut_ds"]
    assert (origin["kind"], origin["step"]) == ("student", 30)
    assert origin["recipe"]["model"]["width"] == 32
    assert all(t.dtype == torch.float32 for t in load_file(result["weights"]).values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_shapes_have_timms_name(name):
    patch, width, depth, heads = ARCHITECTURES[name]
    model = Model(patch_size=patch, width=width, depth=depth, heads=heads)
    assert timm_architecture(model) == (name, {})
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
        ours = Encoder(224, patch, width, depth, heads)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert timm_config(model)["architecture"] == name


def test_vit_small_loads_strictly_under_its_own_name(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    ours = Encoder(224, 16, 384, 12, 6).eval()
    save_file(ours.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    theirs = timm.create_model("vit_small_patch16_224", checkpoint_path=tmp_path / "model.safetensors", num_classes=0)
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(features(theirs, images), features(ours, images), atol=1e-5, rtol=1e-5)


def test_another_resolution_of_a_published_shape_keeps_the_name():
    model = Model(image_size=160, patch_size=16, width=384, depth=12, heads=6)
    assert timm_architecture(model) == ("vit_small_patch16_224", {"img_size": 160})
    other = Model(image_size=160, patch_size=16, width=384, depth=12, heads=6, mlp_ratio=2.0)
    assert timm_architecture(other)[1]["mlp_ratio"] == 2.0


def test_an_earlier_export_is_replaced_and_other_folders_are_left_alone(lut_run, tmp_path):
    first = export_timm(lut_run, "student", tmp_path / "out")
    before = load_file(first["weights"])["cls_token"].clone()
    second = export_timm(lut_run, "ema", tmp_path / "out")
    assert not torch.equal(before, load_file(second["weights"])["cls_token"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"found thesis\.tex in it"):
        export_timm(lut_run, "ema", tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="found a file"):
        export_timm(lut_run, "ema", tmp_path / "file")


def test_what_is_exported_and_other_models_are_not_replaced(lut_run, tmp_path):
    export_timm(lut_run, "ema", tmp_path / "ours")
    before = sorted(path.read_bytes() for path in (tmp_path / "ours").iterdir())
    with pytest.raises(UserError, match=r"ours: is what is exported, and would be replaced; name another"):
        export(str(tmp_path / "ours"), None, str(tmp_path / "ours"), "torchscript")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"theirs: expected a new or empty folder.*found another model"):
        export_timm(lut_run, "ema", theirs)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "num_classes": 3}))
    with pytest.raises(UserError, match="found another model"):
        export_timm(lut_run, "ema", tmp_path / "ours")
    assert len(before) == len(list((tmp_path / "ours").iterdir()))


def tiny(**changes):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_base_patch16_224", **{**sizes, **changes}).eval()


def dino(folder, model):
    state = {f"backbone.{name}": value for name, value in model.state_dict().items() if not name.startswith("head")}
    torch.save(
        {"teacher": state, "student": {f"module.{name}": value for name, value in state.items()}}, folder / "f.pth"
    )
    return str(folder / "f.pth")


def fine_tuned(folder, model):
    sizes = Model(image_size=32, patch_size=8, width=32, depth=2, heads=2)
    about = {"step": 9, "recipe": {"model": {}, "augment": {}}, "top1": 50.0}
    write_timm(folder / "best", classifier_config(sizes, "mean", ["a", "b", "c"], about), model.state_dict())
    return str(folder / "best")


def in_transformers(folder, model):
    torch.save(model.state_dict(), folder / "plain.pth")
    export(str(folder / "plain.pth"), None, str(folder / "hf"), "hf", heads=2)
    return str(folder / "hf")


@pytest.mark.parametrize(
    "write, changes, method",
    [(dino, {}, "dino"), (fine_tuned, {"global_pool": "avg", "fc_norm": True}, None), (in_transformers, {}, None)],
)
def test_any_encoder_goes_to_timm_with_equal_features(write, changes, method, images, tmp_path):
    model = tiny(**changes)
    source, out = write(tmp_path, model), tmp_path / "no. 3, 50 % #2"
    result = export(source, None, str(out), heads=2)
    by_line = eval(result["load"], {"timm": timm})
    local = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    tokens = features(model, images)
    for theirs in (by_line, local):
        torch.testing.assert_close(features(theirs, images), tokens, atol=1e-5, rtol=1e-5)
    expected = load_model(source, heads=2).features(images, "mean")
    torch.testing.assert_close(local(images), expected, atol=1e-5, rtol=1e-5)
    assert load_model(out).record["weights"] == load_model(source, heads=2).record["weights"]
    card = (out / "README.md").read_text()
    assert ("was trained without labels" in card) == (method is not None)
    assert f"pre-trained with {method}" in card or method is None


def test_a_timm_model_keeps_its_name_pixels_and_other_parts(tmp_path):
    result = export("timm:test_vit2", None, str(tmp_path / "out"))
    assert (result["architecture"], result["model_args"]) == ("test_vit2", {})
    found = load_model(tmp_path / "out")
    assert (found.mean, found.crop) == ((0.5, 0.5, 0.5), 0.95)
    assert "reg_token" in found.model.state_dict()


def test_features_that_timm_would_not_compute_are_refused(tmp_path):
    """transformers' ViTs come with any epsilon; timm's have one."""
    folder = in_transformers(tmp_path, tiny())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"expected the same features from timm's model.*--format torch-export"):
        export_timm(folder, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_mae_run_exports_its_student_only(mae_run, tmp_path):
    assert export_timm(mae_run, "student", tmp_path / "out")["kind"] == "student"
    assert export(str(mae_run), None, str(tmp_path / "default"))["kind"] == "student", "nobody said whose"
    with pytest.raises(UserError, match="no EMA teacher"):
        export_timm(mae_run, "ema", tmp_path / "ema")
    assert not (tmp_path / "ema").exists()
