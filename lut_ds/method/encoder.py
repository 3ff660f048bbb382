"""The encoder: timm's VisionTransformer, fed with the rows of the visible patches only."""

from functools import partial

import torch
from lut_kernels import FusedAttention, embed_tokens, linear
from timm.layers import LayerNorm, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lut_ds.method.linear import use_fast_linear
from lut_ds.method.posembed import Positions, position_table


class PatchProjection(nn.Conv2d):
    """The stride-P patch convolution, also as a matrix product over gathered patch rows.

    Input [B, C, S, S] behaves as the convolution; input [B, K, P*P*C] with (row, col, channel) order gives [B, K, D].
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return linear(x, self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, -1), self.bias)
        return super().forward(x)


class RowPatchEmbed(PatchEmbed):
    """timm's PatchEmbed that also takes patch rows; parameter names are timm's."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True, **kwargs: object) -> None:
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, bias=bias, **kwargs)
        self.proj = PatchProjection(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.norm(self.proj(x))
        return super().forward(x)


def run_blocks(blocks: nn.Sequential, x: Tensor, checkpointing: bool) -> Tensor:
    """Apply transformer blocks; with `checkpointing` each block is recomputed in the backward pass."""
    for block in blocks:
        x = (
            checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            if checkpointing and torch.is_grad_enabled()
            else block(x)
        )
    return x


class Encoder(VisionTransformer):
    """timm VisionTransformer without a head; frozen sine-cosine positions are a buffer, so they stay in fp32.

    State-dict names equal timm's. `forward_features(images)` is timm's own path over a whole normalised image.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        positions: Positions = "sincos_2d",
    ) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            norm_layer=partial(LayerNorm, eps=1e-6),
            embed_layer=RowPatchEmbed,
            attn_layer=FusedAttention,
            weight_init="skip",
        )
        del self.pos_embed
        self.register_buffer("pos_embed", position_table(positions, width, image_size // patch_size))
        init_weights(self)
        use_fast_linear(self)

    def forward(self, rows: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode patch rows.

        Args:
            rows: [B, K, P*P*C] normalised pixels of the patches, (row, col, channel) order.
            ids_keep: int64 [B, K], their raster indices; None when rows are all L patches in raster order.

        Returns:
            [B, 1+K, D] after the final norm, cls token first, patches in the order given.
        """
        x = embed_tokens(self.patch_embed(rows), self.cls_token, self.pos_embed, ids_keep)
        return self.norm(run_blocks(self.blocks, x, self.grad_checkpointing))


def make_blocks(width: int, depth: int, heads: int, mlp_ratio: float) -> nn.Sequential:
    """Pre-norm transformer blocks as the encoder's: LN eps 1e-6, qkv bias, exact GELU."""
    norm = partial(LayerNorm, eps=1e-6)
    blocks = (
        Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm, attn_layer=FusedAttention) for _ in range(depth)
    )
    return nn.Sequential(*blocks)


def init_weights(module: nn.Module) -> None:
    """Initialisation of MAE's and LUT's references: Xavier-uniform linears and patch projection, N(0, 0.02) tokens."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.data.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)
