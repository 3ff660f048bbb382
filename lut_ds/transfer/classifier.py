"""The classifier that is fine-tuned: timm's VisionTransformer with a fresh head, its encoder from a pre-trained one.

As MAE and LUT fine-tune (He et al. 2022, appendix A.1): positions are trained, and with `pool="mean"` the mean of the patch
tokens is normalised by `fc_norm` in place of the encoder's final norm, which is left out. Names in the state dict are timm's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from lut_kernels import FusedAttention
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lut_ds.errors import UserError
from lut_ds.method.linear import use_fast_linear
from lut_ds.method.posembed import interpolate_positions
from lut_ds.transfer.droppath import share_drop_paths

Pool = Literal["mean", "cls"]


@dataclass(frozen=True)
class Loaded:
    """What `load_encoder_weights` did with a pre-trained state.

    Attributes:
        fresh: entries of the classifier that the state has not: they keep their initialisation.
        left_out: entries of the state that the classifier has no place for.
        positions: (old, new) patches along a side where positions were interpolated, else None.
        not_read: tensors in the source's file that are no encoder's (heads, decoders), by part.
    """

    fresh: tuple[str, ...]
    left_out: tuple[str, ...]
    positions: tuple[int, int] | None
    not_read: Mapping[str, int] = field(default_factory=dict)


def eval_crop(image_size: int) -> float:
    """Side of the central crop over the resized shorter side, as MAE and LUT evaluate: 0.875, and 1 above 224 pixels."""
    return 0.875 if image_size <= 224 else 1.0


def make_classifier(
    *,
    image_size: int,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    classes: int,
    pool: Pool = "mean",
    drop_path: float = 0.0,
    head_std: float = 2e-5,
) -> VisionTransformer:
    """A ViT classifier: normalised images float [B, 3, S, S] -> logits [B, classes].

    Args:
        pool: `mean` of the patch tokens, then `fc_norm`; or the `cls` token after the final norm.
        drop_path: rate of the last block; it rises linearly from 0 at the first (stochastic depth).
        head_std: of the head's weights, truncated normal; its bias starts at 0.
    """
    model = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        num_classes=classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        global_pool="avg" if pool == "mean" else "token",
        fc_norm=pool == "mean",
        drop_path_rate=drop_path,
        norm_layer=partial(LayerNorm, eps=1e-6),
        attn_layer=FusedAttention,
    )
    nn.init.trunc_normal_(model.head.weight, std=head_std)
    nn.init.zeros_(model.head.bias)
    use_fast_linear(model)
    share_drop_paths(model)
    return model


@torch.no_grad()
def load_encoder_weights(model: VisionTransformer, state: Mapping[str, Tensor], origin: str) -> Loaded:
    """Put a pre-trained encoder's state (timm's names, any grid) into a classifier, in place.

    Args:
        origin: names the state in errors.

    Raises:
        UserError: the state is of another architecture, lacks an entry, or holds NaN or infinity.
    """
    own = model.state_dict()
    expected = {name for name in own if name.partition(".")[0] not in ("head", "fc_norm")}
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    if len(blocks) != len(model.blocks):
        raise UserError(
            f"checkpoint: {origin}: expected the {len(model.blocks)} blocks of model.depth, found {len(blocks)}; "
            "use the recipe of its size, or set model.*"
        )
    if missing := sorted(expected - set(state)):
        raise UserError(
            f"checkpoint: {origin}: expected a ViT encoder, found no {missing[0]} in it; name a pre-trained one"
        )
    parts = {name.partition(".")[0] for name in expected} | {"reg_token", "norm_pre"}
    if odd := sorted(name for name in set(state) - expected if name.partition(".")[0] in parts):
        raise UserError(
            f"checkpoint: {origin}: expected a plain ViT encoder, found also {odd[0]}, which the classifier has no place for; "
            "name another"
        )
    found = {name: state[name] for name in sorted(expected)}
    if bad := next((name for name, value in found.items() if not torch.isfinite(value).all()), None):
        raise UserError(
            f"checkpoint: {origin}: expected finite weights, found NaN or infinity in {bad}; use an older one"
        )
    table, grid = found["pos_embed"], model.patch_embed.grid_size[0]
    old = round((table.shape[1] - 1) ** 0.5)
    found["pos_embed"] = interpolate_positions(table, grid) if old * old == table.shape[1] - 1 else table
    for name, value in found.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"checkpoint: {origin}: {name}: expected shape {list(own[name].shape)} as the recipe's model, found "
                f"{list(value.shape)}; use the recipe of its size, or set model.*"
            )
    model.load_state_dict(found, strict=False)
    left_out = tuple(sorted(set(state) - expected))
    return Loaded(tuple(sorted(set(own) - expected)), left_out, None if old == grid else (old, grid))
