"""Checkpoints of the published code: the golden states saved as that code saves them, in our names and in timm's."""

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from lut_ds.errors import UserError
from lut_ds.method.lut import encode_views, pool
from lut_ds.transfer.export import export_timm
from lut_ds.transfer.models import HEADS, load_model
from tests.golden_data import Golden, golden_files, load_golden
from tests.method.builders import load_teacher, lut_from, mae_from, teacher_from
from tests.transfer.runs import lut_ds

FORWARD = {"atol": 2e-5, "rtol": 0}
LUTS, MAES = golden_files("lut_[a-z].safetensors"), golden_files("mae_[a-z].safetensors")


def saved(path: Path, **content: Any) -> Path:
    """A file as the published training code writes it."""
    namespace = argparse.Namespace(lr=1e-3, model="mae_vit", betas=(0.9, 0.95), resume=None)
    torch.save({"optimizer": {"state": {}, "param_groups": []}, "epoch": 7, "args": namespace, **content}, path)
    return path


def lut_file(folder: Path, golden: Golden) -> Path:
    """LUT's: the student, and the teacher with a prefix."""
    teacher = {f"ema.{name}": value for name, value in golden.group("teacher").items()}
    return saved(folder / "checkpoint-7.pth", model=golden.group("student"), model_ema=teacher, scaler={"scale": 1.0})


@torch.no_grad()
def timm_features(result: dict[str, Any], images: Tensor) -> Tensor:
    """What timm makes of the exported file by the line it was given."""
    return eval(result["load"], {"timm": timm}).eval().forward_features(images)


@pytest.mark.parametrize("path", LUTS, ids=lambda path: path.stem)
def test_golden_published_lut_student_in_our_names(path: Path, tmp_path: Path) -> None:
    golden = load_golden(path)
    found = load_model(lut_file(tmp_path, golden), "student", heads=golden.config["num_heads"])
    student = lut_from(golden.config)
    student.encoder.load_state_dict(found.model.state_dict(), strict=False)  # positions are computed, not stored
    masking = student.mask(golden["in.noise"])
    with torch.no_grad():
        latent = encode_views(student.encoder, [golden["in.view1"], golden["in.view2"]], masking.ids_keep)
    torch.testing.assert_close(latent, torch.cat([golden["out.latent1"], golden["out.latent2"]]), **FORWARD)
    assert (found.record["format"], found.record["epoch"]) == ("lut", 7)


@pytest.mark.parametrize("path", LUTS, ids=lambda path: path.stem)
def test_golden_published_lut_teacher_in_timms_names(path: Path, tmp_path: Path) -> None:
    golden = load_golden(path)
    config = golden.config
    result = export_timm(lut_file(tmp_path, golden), "ema", tmp_path / "out", config["num_heads"])
    for view in ("1", "2"):
        features = timm_features(result, golden[f"in.view{view}"])
        torch.testing.assert_close(features, golden[f"out.teacher_latent{view}"], **FORWARD)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    teacher = teacher_from(config)
    load_teacher(teacher, golden.group("teacher"))
    with torch.no_grad():
        pooled = pool(encode_views(teacher.encoder, [golden["in.view1"]], None))
        torch.testing.assert_close(model(golden["in.view1"]), pooled, **FORWARD)
    left = dict(result["left_out"])
    assert left.pop("model") == len(golden.group("student"))
    heads = {name for name, key in (("head", "depth_head"), ("predictor", "depth_pred")) if config[key]}
    assert {part for part in left if "decoder" not in part} == {"mask_token", *heads}
    assert sum(left.values()) + len(model.state_dict()) == len(golden.group("teacher"))
    about = json.loads((tmp_path / "out" / "config.json").read_text())["lut_ds"]
    assert (about["kind"], about["published"], about["epoch"]) == ("ema", "checkpoint-7.pth", 7)


@pytest.mark.parametrize("path", MAES, ids=lambda path: path.stem)
def test_golden_published_mae(path: Path, tmp_path: Path) -> None:
    golden = load_golden(path)
    file = saved(tmp_path / "mae.pth", model=golden.group("model"))
    found = load_model(file, heads=golden.config["num_heads"])
    model = mae_from(golden.config)
    model.encoder.load_state_dict(found.model.state_dict(), strict=False)  # positions are computed, not stored
    masking = model.mask(golden["in.noise"])
    with torch.no_grad():
        latent = encode_views(model.encoder, [golden["in.view"]], masking.ids_keep)
        torch.testing.assert_close(latent, golden["out.latent"], **FORWARD)
    result = export_timm(file, None, tmp_path / "out", golden.config["num_heads"])
    assert all(part.startswith("decoder") or part == "mask_token" for part in result["left_out"])
    with torch.no_grad():
        expected = model.encoder.eval().forward_features(golden["in.view"])
    torch.testing.assert_close(timm_features(result, golden["in.view"]), expected, **FORWARD)
    with pytest.raises(UserError, match=r"expected weights of kind 'ema'.*--student"):
        export_timm(file, "ema", tmp_path / "average", golden.config["num_heads"])


def encoder_state(width: int, patch: int = 16, grid: int = 2, depth: int = 1) -> dict[str, Tensor]:
    """An encoder alone, as in the files that MAE's authors share, of a published width."""
    heads = HEADS.get(width, 1)
    model = timm.create_model(
        "vit_base_patch16_224", img_size=grid * patch, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads
    )
    return {k: v.half() for k, v in model.state_dict().items() if not k.startswith("head.")}


@pytest.mark.parametrize("width,patch", [(384, 16), (768, 16), (1280, 14)])
def test_an_encoder_alone_in_half_precision(width: int, patch: int, tmp_path: Path) -> None:
    file = saved(tmp_path / "encoder.pth", model=encoder_state(width, patch))
    found = load_model(file)
    assert found.record["sizes"] == {"width": width, "heads": HEADS[width], "depth": 1, "patch_size": patch}
    assert (found.image_size, found.record["left_out"]) == (2 * patch, {})
    assert all(value.dtype == torch.float32 for value in found.model.state_dict().values())


class Pwned:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def changed(width: int = 384, **changes: Tensor | None) -> dict[str, Tensor]:
    """An encoder's state with entries replaced, added, or (None) removed."""
    state: dict[str, Any] = {**encoder_state(width), **changes}
    return {name: value for name, value in state.items() if value is not None}


def test_what_a_file_holds_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "pwned"
    file = saved(tmp_path / "bad.pth", model=encoder_state(384), more=Pwned(marker))
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Pwned(marker)))
    for path in (file, tmp_path / "evil.pth"):
        with pytest.raises(UserError, match="cannot be read safely"):
            load_model(path, "student")
    done = lut_ds("export", "evil.pth", "--student", "-o", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, named",
    [
        ({}, "something else at optimizer"),
        ({"model": 3}, "something else at optimizer"),
        ({"model": {"cls_token": 3}}, "something else at cls_token"),
        ({"model": {}}, "found an empty state dict"),
        ({"model": changed(pos_embed=None)}, "no pos_embed"),
        ({"model": changed(**{"norm.weight": None})}, "found none of norm.weight"),
        ({"model": changed(**{"fc_norm.weight": torch.ones(384)})}, "found none of fc_norm.bias"),
        ({"model": changed(cls_token=torch.full((1, 1, 384), torch.nan))}, "infinity in cls_token"),
        ({"model": changed(pos_embed=torch.ones(5, 384))}, "other dimensions"),
        ({"model": changed(**{"norm.weight": torch.ones(3)})}, "found norm.weight .3. for .384."),
        ({"model": changed(width=64)}, "--heads N"),
    ],
)
def test_what_is_no_encoder_is_named_and_nothing_is_written(
    content: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named) as caught:
        export_timm(saved(tmp_path / "file.pth", **content), "student", tmp_path / "out")
    assert "file.pth" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_a_damaged_file_is_one_line(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "damaged.pth"
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged\.pth") as caught:
        load_model(file, "student")
    assert "\n" not in str(caught.value)


def test_the_command_takes_a_file(tmp_path: Path) -> None:
    golden = load_golden(LUTS[0])
    file = lut_file(tmp_path, golden)
    heads = str(golden.config["num_heads"])
    done = lut_ds("export", str(file), "--ema", "--heads", heads, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "left out: model (" in done.stdout
    assert "decoder_blocks (" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    done = lut_ds("export", str(file), "-o", "other", cwd=tmp_path)
    assert done.returncode == 2
    assert "--heads" in done.stderr
    assert not (tmp_path / "other").exists()
