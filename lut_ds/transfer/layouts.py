"""Checkpoint files of other code: which layout a file has, and the encoder in it under timm's names."""

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lut_ds.errors import UserError
from lut_ds.transfer.load import Kind

# First parts of timm's names in a ViT; anything else in a file belongs to heads, decoders and objectives.
_TOKENS, _POOLING = ("cls_token", "dist_token", "reg_token"), ("attn_pool", "fc_norm")
ENCODER_PARTS = (*_TOKENS, "pos_embed", "patch_embed", "norm_pre", "blocks", "norm", *_POOLING)
_MOCO_NAMES = ("vit_small", "vit_base", "vit_conv_small", "vit_conv_base")  # MoCo v3's, for `arch` in its files
# What distributed training, torch.compile, Lightning and the codes themselves put before names.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "base_encoder.", "momentum_encoder.", "backbone.", "ema.", "encoder.")


@dataclass(frozen=True)
class StateDict:
    """The encoder of a file.

    Attributes:
        layout: lut, mae, moco_v3, dino, ibot or plain.
        kind: whose weights, None where the file has one set and does not say.
        weights: fp32, finite, with timm's names.
        left_out: tensors of each other part, by the first part of its name, and of other state dicts by what they are called.
        epoch: the one it was saved after, where the file says so.
        head: `head.weight` [C, D] and `head.bias` [C] of a linear classifier, fp32; empty where the file has none.
    """

    layout: str
    kind: Kind | None
    weights: dict[str, Tensor]
    left_out: dict[str, int]
    epoch: int | None
    head: dict[str, Tensor] = field(default_factory=dict)


def read_state_dict(path: Path, kind: Kind | None) -> StateDict:
    """Read a .safetensors file, or a file of torch.save without running anything that is in it.

    Known layouts: LUT and MAE (`model`, `model_ema`), MoCo v3 (`state_dict` with base and momentum encoder, or a classifier's),
    DINO and iBOT (`student`, `teacher`), timm's training (`state_dict`, `state_dict_ema`), and an encoder alone, at the top or
    under `state_dict` or `model`.

    Args:
        kind: the student (MoCo's base encoder), or the average of it; None takes the average where there is one.

    Raises:
        UserError: no such file, not readable safely, no such weights in it, or values that are not finite.
    """
    content = load_tensors(path) if path.suffix == ".safetensors" else load_safely(path)
    layout, found, state, others = _find(content, kind, path)
    weights: dict[str, Tensor] = {}
    left_out = Counter(others)
    head: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not is_plain(value):
            raise UserError(
                f"checkpoint: {path}: expected plain tensors, found something else at {name}; is it a state dict?"
            )
        short = _unwrapped(name)
        part = short.partition(".")[0]
        if part in ENCODER_PARTS:
            weights[short] = value.float() if value.is_floating_point() else value
        else:
            left_out[part] += 1
        if short in ("head.weight", "head.bias"):
            head[short] = value.float()
    if layout == "dino" and ("masked_embed" in left_out or "ibot_loss" in content):
        layout = "ibot"
    if not weights:
        raise UserError(f"checkpoint: {path}: expected a Vision Transformer, found {_some(state)}; name another file")
    head = head if len(head) == 2 and head["head.weight"].dim() == 2 else {}
    check_finite({**weights, **head}, path)
    epoch = content.get("epoch")
    return StateDict(layout, found, weights, dict(left_out), epoch if isinstance(epoch, int) else None, head)


def is_plain(value: object) -> bool:
    """Whether it is a tensor with an ordinary number at every place: not sparse, complex, quantized or without values."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_complex() or value.is_quantized or value.is_meta)


def check_finite(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """UserError naming the first tensor with NaN or infinity in it."""
    broken = next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise UserError(f"checkpoint: {path}: expected finite weights, found NaN or infinity in {broken}; use another")


def load_safely(path: Path, expected: str = "expected a state dict") -> Mapping[Any, Any]:
    """What torch.save wrote: tensors, numbers and text only; UserError for a file that holds code, or is damaged."""
    try:
        # Training code saves its arguments along; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles that are not its own: they are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint: {path}: no such file; correct the path") from None
    except Exception as error:  # a damaged file leads torch's reader to errors of any kind
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"checkpoint: {path}: {expected}, found a file that cannot be read safely: {reason or type(error).__name__}; name another"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint: {path}: {expected}, found a {type(content).__name__}; name another")
    return content


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; UserError where it is not there, or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint: {path}: cannot be read as safetensors: {error}; copy it again") from error


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a timm export folder; UserError where it is not one."""
    try:
        config = json.loads(path.read_text())
        if "segmenter" in config:
            raise UserError(
                f"checkpoint: {path.parent}: expected an encoder or a classifier, found a segmenter; name what it started from"
            )
        if not isinstance(config["architecture"], str):
            raise ValueError("architecture is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint: {path}: expected timm's config.json with an architecture, found: {error}; export it again"
        ) from error
    return config


def _find(
    content: Mapping[Any, Any], kind: Kind | None, path: Path
) -> tuple[str, Kind | None, Mapping[Any, Any], dict[str, int]]:
    """Layout, whose weights, their state dict, and the tensors of other state dicts by what these are called."""
    state = content.get("state_dict")
    if isinstance(state, Mapping):
        return _find_moco(content, state, kind, path)
    for layout, sets in (
        ("dino", {"student": "student", "ema": "teacher"}),
        ("lut", {"student": "model", "ema": "model_ema"}),
    ):
        held = {name: content.get(entry) for name, entry in sets.items()}
        if not any(isinstance(each, Mapping) for each in held.values()):
            continue
        if layout == "lut" and held["ema"] is None:  # MAE's pre-training has a mask token, and it has no average
            if isinstance(held["student"], Mapping) and "mask_token" not in held["student"] and kind is None:
                return "plain", None, held["student"], {}
            layout = "mae"
        return layout, *_held(sets, content, kind, path)
    return "plain", None, content, {}


def _held(
    sets: Mapping[str, str], content: Mapping[Any, Any], kind: Kind | None, path: Path
) -> tuple[Kind, Mapping[Any, Any], dict[str, int]]:
    """Whose weights, their state dict, and the tensors of the other one, of a file with an entry for each of `sets`."""
    held = {name: content.get(entry) for name, entry in sets.items()}
    whose, chosen = _pick(held, kind, path)
    return whose, chosen, {sets[n]: len(each) for n, each in held.items() if n != whose and isinstance(each, Mapping)}


def _find_moco(
    content: Mapping[Any, Any], state: Mapping[Any, Any], kind: Kind | None, path: Path
) -> tuple[str, Kind | None, Mapping[Any, Any], dict[str, int]]:
    """As `_find`, of a file with a `state_dict`: MoCo v3's pre-training and classifiers, or an encoder alone."""
    sets = {
        name: {k: v for k, v in state.items() if isinstance(k, str) and part in k}
        for name, part in (("student", "base_encoder."), ("ema", "momentum_encoder."))
    }
    if not any(sets.values()):
        if isinstance(content.get("state_dict_ema"), Mapping):  # timm's own loader takes this one, too
            return "plain", *_held({"student": "state_dict", "ema": "state_dict_ema"}, content, kind, path)
        return "moco_v3" if content.get("arch") in _MOCO_NAMES else "plain", None, state, {}
    whose, chosen = _pick(sets, kind, path)
    others = Counter(str(name).removeprefix("module.").partition(".")[0] for name in state if name not in chosen)
    return "moco_v3", whose, chosen, dict(others)


def _pick(sets: Mapping[str, Any], kind: Kind | None, path: Path) -> tuple[Kind, Mapping[Any, Any]]:
    found = [name for name, state in sets.items() if isinstance(state, Mapping) and state]
    if not found:
        raise UserError(
            f"checkpoint: {path}: expected a Vision Transformer, found an empty state dict; name another file"
        )
    kind = kind or ("ema" if "ema" in found else "student")
    if kind not in found:
        advice = (
            "take the student's weights (--student, in a recipe model.weights=student)"
            if "student" in found
            else "take the average (--ema, in a recipe model.weights=ema)"
        )
        raise UserError(
            f"checkpoint: {path}: expected weights of kind {kind!r}, found {', '.join(found)} alone; {advice}"
        )
    return kind, sets[kind]


def _unwrapped(name: str) -> str:
    while (prefix := next((w for w in _WRAPPERS if name.startswith(w)), None)) is not None:
        name = name.removeprefix(prefix)
    return name


def _some(state: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, list(state)[:4])) or "nothing"
