"""Multi-head self-attention on the packed output of one qkv projection, for the short sequences of a ViT."""

from __future__ import annotations

import torch

from lut_kernels.checks import FLOATS, expect_dtype, expect_shape


def _check(qkv: torch.Tensor, num_heads: int) -> int:
    """Return the head dim."""
    expect_dtype("qkv", qkv.dtype, FLOATS)
    expect_shape("qkv", qkv, (None, None, None))
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads) != 0:
        raise ValueError(f"num_heads: expected a divisor of {qkv.shape[2]} / 3 (the width of qkv), found {num_heads}")
    return qkv.shape[2] // (3 * num_heads)


def _reference(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for every head, [B, N, H*d] in the dtype of qkv.

    qkv: float [B, N, 3*H*d], packed as (q, k, v) x heads x head dim.
    Raises ValueError or TypeError naming the argument at fault.
    """
    _check(qkv, num_heads)
    return _reference(qkv, num_heads)
