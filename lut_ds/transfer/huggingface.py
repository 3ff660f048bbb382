"""The encoder as a folder of Hugging Face's `transformers`, and back: ViTModel's config.json, names and preprocessor.

`ViTModel.from_pretrained(DIR, add_pooling_layer=False)` then has our encoder's tokens as `last_hidden_state`: cls first, then
patches, after the final norm.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lut_ds.errors import UserError
from lut_ds.transfer.layouts import check_finite, load_tensors

if TYPE_CHECKING:
    from lut_ds.transfer.models import Pretrained

_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")


def vit_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of a plain ViT as those of ViTModel; queries, keys and values apart.

    Raises:
        UserError: an entry that a plain ViT has not, or lacks: ViTModel has no place for it.
    """
    renamed: dict[str, Tensor] = {}
    unknown = None
    for name, value in state.items():
        block, part, kind = _parts(name)
        if name in _EMBEDDINGS:
            renamed[_EMBEDDINGS[name]] = value
        elif block is not None and part == "attn.qkv":
            for which, tensor in zip(_QKV, value.chunk(3), strict=True):
                renamed[f"encoder.layer.{block}.attention.attention.{which}.{kind}"] = tensor
        elif block is not None and part in _BLOCK:
            renamed[f"encoder.layer.{block}.{_BLOCK[part]}.{kind}"] = value
        else:
            unknown = unknown or name
    absent = next((name for name in _EMBEDDINGS if name not in state), None)
    if unknown or absent:
        found = f"{unknown} in it" if unknown else f"no {absent}"
        raise UserError(
            f"--format hf: expected a plain pre-trained ViT (cls token, positions, final norm), found {found}, which ViTModel "
            "cannot hold; take --format torch-export, or the encoder before fine-tuning"
        )
    return {name: value.clone().contiguous() for name, value in renamed.items()}


def vit_config(found: "Pretrained", about: Mapping[str, Any]) -> dict[str, Any]:
    """ViTModel's config.json; `about` says where the weights come from."""
    model, sizes = found.model, found.record["sizes"]
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": model.blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm.eps if hasattr(model.norm, "eps") else 1e-6,
        "qkv_bias": model.blocks[0].attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "image_size": found.image_size,
        "patch_size": sizes["patch_size"],
        "num_channels": 3,
        "encoder_stride": sizes["patch_size"],
        "torch_dtype": str(torch.float32).removeprefix("torch."),
        "lut_ds": dict(about),
    }


def preprocessor_config(found: "Pretrained") -> dict[str, Any]:
    """The evaluation's transform as an image processor with a centre crop (ViTImageProcessor has none)."""
    side = found.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(side / found.crop)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(found.mean),
        "image_std": list(found.std),
    }


def _parts(name: str) -> tuple[str | None, str, str]:
    """`blocks.3.attn.qkv.weight` -> 3, attn.qkv, weight."""
    if not name.startswith("blocks."):
        return None, name, ""
    _, block, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return block, part, kind


@dataclass(frozen=True)
class ViTFolder:
    """What a folder of transformers' ViT holds.

    Attributes:
        model: timm's, of its sizes, weights not yet set.
        weights: fp32, finite, with timm's names.
        head: `head.weight` and `head.bias` of ViTForImageClassification, else empty.
        left_out: tensors of other parts, such as the pooler.
        config: config.json.
        pixels: `mean`, `std` and `crop_pct`, as far as preprocessor_config.json says them.
    """

    model: VisionTransformer
    weights: dict[str, Tensor]
    head: dict[str, Tensor]
    left_out: dict[str, int]
    config: dict[str, Any]
    pixels: dict[str, Any]


def is_vit_folder(config: Path) -> bool:
    """Whether a config.json is that of a ViT of transformers."""
    return _json(config).get("model_type") == "vit"


def read_vit(folder: Path) -> ViTFolder:
    """Read a folder for which `is_vit_folder` is true.

    Raises:
        UserError: a config.json without sizes, another activation, or weights that cannot be read or are not finite.
    """
    config, place = _json(folder / "config.json"), folder / "config.json"
    try:
        model = VisionTransformer(
            img_size=int(config["image_size"]),
            patch_size=int(config["patch_size"]),
            embed_dim=config["hidden_size"],
            depth=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            mlp_ratio=config["intermediate_size"] / config["hidden_size"],
            qkv_bias=config.get("qkv_bias", True),
            num_classes=0,
            norm_layer=partial(LayerNorm, eps=config["layer_norm_eps"]),
            weight_init="skip",
        )
    except (KeyError, TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:160]
        raise UserError(f"checkpoint: {place}: expected the sizes of a ViT, found {reason}; export it again") from error
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"checkpoint: {place}: expected hidden_act gelu, found {config['hidden_act']}; name another model"
        )
    weights, head, left_out = timm_names(load_tensors(folder / "model.safetensors"))
    check_finite({**weights, **head}, folder)
    return ViTFolder(model, weights, head, left_out, config, _pixels(_json(folder / "preprocessor_config.json")))


def timm_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """ViTModel's or ViTForImageClassification's names as timm's: encoder, linear head, and tensors of other parts by name."""
    embeddings = {theirs: ours for ours, theirs in _EMBEDDINGS.items()}
    parts = {theirs: ours for ours, theirs in _BLOCK.items()}
    weights: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    left_out: Counter[str] = Counter()
    for long, value in state.items():
        name, value = long.removeprefix("vit."), value.float()
        where, _, kind = name.rpartition(".")
        block, _, part = where.removeprefix("encoder.layer.").partition(".")
        first, _, which = part.rpartition(".")
        if name in embeddings:
            weights[embeddings[name]] = value
        elif where.startswith("encoder.layer.") and part in parts:
            weights[f"blocks.{block}.{parts[part]}.{kind}"] = value
        elif where.startswith("encoder.layer.") and first == "attention.attention" and which in _QKV:
            packed.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[which] = value
        elif where == "classifier":
            head[f"head.{kind}"] = value
        else:
            left_out[name.partition(".")[0]] += 1
    weights |= {name: torch.cat([found[w] for w in _QKV if w in found]) for name, found in packed.items()}
    return weights, head if len(head) == 2 else {}, dict(left_out)


def _pixels(told: Mapping[str, Any]) -> dict[str, Any]:
    """timm's words for what a preprocessor says."""
    found = {ours: told[theirs] for ours, theirs in (("mean", "image_mean"), ("std", "image_std")) if theirs in told}
    crop, size = told.get("crop_size"), told.get("size")
    if isinstance(crop, dict) and isinstance(size, dict) and "shortest_edge" in size and "height" in crop:
        # A share that gives the edge again when timm's transform cuts off int(height / share).
        found["crop_pct"] = min(1.0, crop["height"] / size["shortest_edge"]) * (1 - 1e-12)
    return found


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
