"""The operator as a timm attention layer."""

from __future__ import annotations

import torch
from timm.layers.attention import Attention
from torch import nn

from lut_kernels.attention import attention


class FusedAttention(Attention):
    """Drop-in `attn_layer` for timm's VisionTransformer and Block: same constructor, parameters and state-dict names.

    Masks, attention dropout while training, qk-norm and gating are not in the operator: those go to timm's own forward.
    """

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """x: float [B, N, D] to [B, N, D_out]."""
        dropout = self.training and self.attn_drop.p > 0.0
        qk_norm = not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity))
        if attn_mask is not None or is_causal or dropout or qk_norm or self.gate is not None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(self.norm(attention(self.qkv(x), self.num_heads))))
