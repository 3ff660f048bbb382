"""The encoder as a folder of Hugging Face's `transformers`: ViTModel's config.json, names and preprocessor.

`ViTModel.from_pretrained(DIR, add_pooling_layer=False)` then has our encoder's tokens as `last_hidden_state`: cls first, then
patches, after the final norm.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lut_ds.errors import UserError
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
            "cannot hold; take --format timm, or the encoder before fine-tuning"
        )
    return {name: value.clone().contiguous() for name, value in renamed.items()}


def vit_config(found: Pretrained, about: Mapping[str, Any]) -> dict[str, Any]:
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


def preprocessor_config(found: Pretrained) -> dict[str, Any]:
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
