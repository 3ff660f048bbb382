"""MAE's decoder: mask tokens join the visible ones, and only hidden patches are predicted."""

from functools import partial

import torch
import torch.nn.functional as F
from lut_kernels import unshuffle_tokens
from timm.layers import LayerNorm
from torch import Tensor, nn

from lut_ds.method.encoder import init_weights, make_blocks, run_blocks
from lut_ds.method.linear import use_fast_linear
from lut_ds.method.posembed import Positions, position_table


class Decoder(nn.Module):
    """Linear embedding, mask tokens, frozen positions, `depth` blocks, norm and the pixel head.

    Args:
        encoder_width: D of the latents.
        grid: patches along a side.
        width, depth, heads, mlp_ratio: of the decoder's blocks.
        patch_dim: P*P*3, size of a prediction.
        positions: kind of the position table.
    """

    def __init__(
        self,
        encoder_width: int,
        grid: int,
        width: int,
        depth: int,
        heads: int,
        patch_dim: int,
        mlp_ratio: float = 4.0,
        positions: Positions = "sincos_2d",
    ) -> None:
        super().__init__()
        self.pos_embed: Tensor
        self.grad_checkpointing = False
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", position_table(positions, width, grid))
        self.blocks = make_blocks(width, depth, heads, mlp_ratio)
        self.norm = partial(LayerNorm, eps=1e-6)(width)
        self.pred = nn.Linear(width, patch_dim)
        init_weights(self)
        use_fast_linear(self)

    def forward(self, latent: Tensor, ids_restore: Tensor, ids_predict: Tensor | None = None) -> Tensor:
        """Predict patches from the visible latents.

        Args:
            latent: [B, 1+K, D], cls first, patches in shuffle order.
            ids_restore: int64 [B, L], the inverse of the shuffle.
            ids_predict: int64 [B, M], raster indices of the patches to predict; None predicts all L.

        Returns:
            [B, M, P*P*3] (or [B, L, P*P*3]).
        """
        x = unshuffle_tokens(self.embed(latent), self.mask_token, self.pos_embed, ids_restore)
        x = run_blocks(self.blocks, x, self.grad_checkpointing)
        if ids_predict is None:
            x = x[:, 1:]
        else:
            # As an embedding lookup: its backward moves whole rows, and repeats to the bit without sorting elements.
            first = torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]
            x = F.embedding(first + 1 + ids_predict, x.flatten(0, 1))
        return self.pred(self.norm(x))
