"""The encoder as a timm checkpoint: model.safetensors with timm's names, and the config.json that timm's `local-dir:` reads."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lut_ds.config import Model
from lut_ds.data.outputs import check_writable
from lut_ds.errors import RunFault, UserError
from lut_ds.method.pixels import IMAGENET_MEAN, IMAGENET_STD
from lut_ds.transfer.classifier import eval_crop
from lut_ds.transfer.load import Kind, find_checkpoint
from lut_ds.transfer.models import Pretrained, load_model
from lut_ds.transfer.programs import TOLERANCE

WEIGHTS, CONFIG, CARD, PREPROCESSOR = "model.safetensors", "config.json", "README.md", "preprocessor_config.json"
PROGRAMS = {"torch-export": "encoder.pt2", "onnx": "encoder.onnx", "torchscript": "encoder.torchscript.pt"}
FILES = {
    WEIGHTS,
    CONFIG,
    CARD,
    PREPROCESSOR,
    *PROGRAMS.values(),
    "encoder.onnx.data",
}  # all that an export of any format writes
# timm's name: patch side, width, depth, heads. All have mlp_ratio 4 and 224 pixels.
ARCHITECTURES = {
    "vit_small_patch16_224": (16, 384, 12, 6),
    "vit_base_patch16_224": (16, 768, 12, 12),
    "vit_large_patch16_224": (16, 1024, 24, 16),
    "vit_huge_patch14_224": (14, 1280, 32, 16),
}
# timm would pool the cls token, and normalise after pooling; the method pools normed patch tokens.
POOLING = {"global_pool": "avg", "fc_norm": False}


def timm_architecture(model: Model) -> tuple[str, dict[str, Any]]:
    """timm's name for an encoder, and the constructor arguments in which it differs from that name's own."""
    shape = (model.patch_size, model.width, model.depth, model.heads)
    size = {} if model.image_size == 224 else {"img_size": model.image_size}
    for name, known in ARCHITECTURES.items():
        if shape == known and model.mlp_ratio == 4.0:
            return name, size
    keys = ("patch_size", "embed_dim", "depth", "num_heads")
    return "vit_base_patch16_224", {**size, **dict(zip(keys, shape, strict=True)), "mlp_ratio": model.mlp_ratio}


def timm_config(model: Model) -> dict[str, Any]:
    """The config.json that makes `timm.create_model("local-dir:DIR", pretrained=True)` this encoder.

    Its output without a head is the mean of the normed patch tokens, cls excluded.
    """
    architecture, model_args = timm_architecture(model)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.width,
        "model_args": {**model_args, **POOLING},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, model.image_size, model.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def classifier_config(model: Model, pool: str, labels: Sequence[str], about: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a fine-tuned classifier; `about` says where it comes from."""
    config = timm_config(model)
    pooling = {"global_pool": "avg", "fc_norm": True} if pool == "mean" else {"global_pool": "token", "fc_norm": False}
    config["model_args"] |= pooling
    config["num_classes"] = config["pretrained_cfg"]["num_classes"] = len(labels)
    config["pretrained_cfg"] |= {"label_names": list(labels), "crop_pct": eval_crop(model.image_size)}
    return {**config, "lut_ds": about}


def encoder_config(found: Pretrained) -> dict[str, Any]:
    """The config.json of any encoder: timm's own with timm's pooling, others with the mean of the patch tokens."""
    encoder, sizes = found.model, found.record["sizes"]
    ratio = encoder.blocks[0].mlp.fc1.out_features / sizes["width"]
    config = timm_config(Model(**sizes, image_size=found.image_size, mlp_ratio=ratio))
    if found.timm is not None:
        config["architecture"], config["model_args"] = found.timm[0], dict(found.timm[1])
    elif "fc_norm.weight" in encoder.state_dict():
        config["model_args"]["fc_norm"] = True
    elif encoder.blocks[0].attn.qkv.bias is None:
        config["model_args"]["qkv_bias"] = False
    config["pretrained_cfg"] |= {"mean": list(found.mean), "std": list(found.std), "crop_pct": found.crop}
    return config


def origin(source: str | Path, found: Pretrained) -> dict[str, Any]:
    """Where the weights come from, for config.json and the card: kind, step, and the recipe where it is recorded."""
    record = found.record
    about: dict[str, Any] = {"kind": record["kind"], "step": record["step"]}
    if record["format"] == "run":
        return about | {"recipe": find_checkpoint(source).recipe.model_dump(mode="json")}
    config = Path(source) / CONFIG
    if record["format"] in ("export", "transformers") and config.is_file():
        return about | (json.loads(config.read_text()).get("lut_ds") or {})
    return about | {"published": Path(source).name, "epoch": record["epoch"], "left_out": record["left_out"]}


def export_timm(source: str | Path, kind: Kind | None, output: str | Path, heads: int | None = None) -> dict[str, Any]:
    """Write an encoder as a timm checkpoint, and see that timm computes the same from it.

    `timm.create_model(architecture, checkpoint_path=DIR/model.safetensors, num_classes=0, **model_args)` loads it strictly.
    With timm's default of 1000 classes the file, which has no head, is refused by name ("head.weight" missing): ask for
    `num_classes=0`, or load through `local-dir:DIR`, where a head of any size is added fresh. The mean and std of its pixels
    are in config.json: ours and the published codes' are ImageNet's, which is not what timm's own ViTs of these names expect.

    Args:
        source, heads: as `load_model`'s.
        kind: `student` or `ema`; None takes the average where there is one.
        output: folder to write; new, empty, or an earlier export, which is replaced whole.

    Returns:
        `weights`, `config` (paths), `kind`, `step` (both None where they are not known), `architecture`, `model_args`, `load`
        (a line of Python), `left_out` (tensors of the source by part, such as decoder and heads).

    Raises:
        UserError: no such encoder, no teacher in it, one that timm does not make of a name, or a folder that holds something else.
        RunFault: the folder cannot be written.
    """
    folder = Path(output).absolute()
    check_output(folder, source)
    found = load_model(source, kind, heads=heads)
    config = encoder_config(found)

    def write(aside: Path) -> None:
        _fill(aside, {**config, "lut_ds": origin(source, found)}, found.model.state_dict())
        _check_parity(aside / WEIGHTS, config, found)

    write_folder(folder, write)
    architecture, weights = config["architecture"], folder / WEIGHTS
    model_args = dict(item for item in config["model_args"].items() if item not in POOLING.items())
    arguments = "".join(f", {key}={value!r}" for key, value in model_args.items())
    return {
        "weights": str(weights),
        "config": str(folder / CONFIG),
        "kind": found.record["kind"],
        "step": found.record["step"],
        "architecture": architecture,
        "model_args": model_args,
        "load": f"timm.create_model({architecture!r}, checkpoint_path={str(weights)!r}, num_classes=0{arguments})",
        "left_out": found.record["left_out"],
    }


def write_timm(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors as the folder, replacing it whole.

    Raises:
        RunFault: the folder cannot be written; what was there is unchanged.
    """

    write_folder(folder, lambda aside: _fill(aside, config, tensors))


def _fill(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


@torch.no_grad()
def _check_parity(weights: Path, config: Mapping[str, Any], found: Pretrained) -> None:
    """UserError unless timm computes the encoder's tokens from the file."""
    images = torch.randn(2, 3, found.image_size, found.image_size, generator=torch.Generator().manual_seed(0))
    expected = found.model.forward_features(images)
    arguments = {**config["model_args"], "num_classes": 0}
    model = timm.create_model(config["architecture"], checkpoint_path=str(weights), **arguments)
    told = model.eval().forward_features(images)
    difference = float((told - expected).abs().max() / expected.abs().max())
    if difference > TOLERANCE:
        raise UserError(
            f"--format timm: expected the same features from timm's model of these sizes, found a difference of {difference:.1e} "
            "of the largest value; take --format torch-export"
        )


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder aside, and put it where `folder` is, replacing that whole.

    Raises:
        RunFault: the folder cannot be written; what was there is unchanged.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True)
        write(aside)
        _replace_folder(aside, folder)
    except (OSError, SafetensorError) as error:
        raise RunFault(f"export: {folder} not written: {error}; nothing there was changed") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_output(folder: Path, source: str | Path) -> None:
    """UserError unless the folder is new or empty, or holds an earlier export, which is not the source, and nothing else."""
    check_writable(output=folder)
    named = str(source).split(":", 2)
    origin = Path(named[-1] if named[0] == "timm" and len(named) == 3 else source).resolve()
    if origin.exists() and folder.resolve() in (origin, origin.parent if origin.is_file() else origin):
        raise UserError(f"output: {folder}: is what is exported, and would be replaced; name another folder")
    _check_ours(folder)
    strangers = sorted({p.name for p in folder.iterdir()} - FILES) if folder.is_dir() else []
    if strangers:
        raise UserError(
            f"output: {folder}: expected a new or empty folder, or an earlier export, found {strangers[0]} in it; name another"
        )


def _check_ours(folder: Path) -> None:
    """UserError for a config.json that no export wrote: another model's, or that of a trained classifier or segmenter."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or "lut_ds" not in config or config.get("num_classes") or "segmenter" in config:
        raise UserError(
            f"output: {folder}: expected a new or empty folder, or an earlier export, found another model; name another"
        )


def _replace_folder(aside: Path, folder: Path) -> None:
    """Put `aside` where `folder` is; a reader finds the old one, or the new one, or for an instant none, never a mixture."""
    retired = folder.with_name(f"{aside.name}.old")
    if folder.exists():
        os.replace(folder, retired)
    os.replace(aside, folder)
    shutil.rmtree(retired, ignore_errors=True)
