"""Launchers of the attention kernels: tiles, scales, and which backward a length takes."""

from __future__ import annotations

import math

import torch
import triton

from lut_kernels.attention_kernels import (
    backward_kv_kernel,
    backward_one_tile_kernel,
    backward_q_kernel,
    delta_kernel,
    forward_kernel,
)
from lut_kernels.dispatch import tile
from lut_kernels.runtime import accumulator, launch


def split_head(head_dim: int) -> tuple[int, int]:
    """(D0, D1): tile widths that cover the head dim, a power of two and 16 more, or one power of two alone.

    80 takes 64 + 16. A wider second tile, as 64 + 32 for 96, spills registers on sm_80 in every backward tried.
    """
    whole = max(16, triton.next_power_of_2(head_dim))
    half = whole // 2
    return (half, 16) if half > 16 and head_dim <= half + 16 else (whole, 0)


def _precision(dtype: torch.dtype) -> str:
    """fp32 follows torch's own switch for matrix products; it has no meaning for the other types."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def launch_forward(qkv: torch.Tensor, num_heads: int, save: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, N, H*d], lse [B, H, N] or empty unless `save`)."""
    batch, tokens, packed = qkv.shape
    head_dim = packed // (3 * num_heads)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    qkv = qkv.contiguous()
    out = qkv.new_empty((batch, tokens, packed // 3))
    lse = qkv.new_empty((batch, num_heads, tokens) if save else (0,), dtype=wide)
    if out.numel() == 0:
        return out, lse
    config = tile("attention_forward", qkv.device, qkv.dtype, tokens, head_dim)
    heads = math.gcd(config["heads"], num_heads)
    first, rest = split_head(head_dim)
    row_blocks = triton.cdiv(tokens, config["rows"])
    launch(
        forward_kernel, batch * (num_heads // heads) * row_blocks, qkv,
        qkv, out, lse, tokens, num_heads, num_heads // heads, row_blocks, head_dim**-0.5 * math.log2(math.e),
        D=head_dim, D0=first, D1=rest, ROWS=config["rows"], STEP=config["step"], HEADS=heads, SAVE=save,
        ACC=accumulator(qkv.dtype), PRECISION=_precision(qkv.dtype),
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
    return out, lse


def launch_backward(
    grad: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Gradient of qkv, packed as qkv. No atomics: always the same."""
    batch, tokens, packed = qkv.shape
    head_dim = packed // (3 * num_heads)
    qkv, out, grad = qkv.contiguous(), out.contiguous(), grad.contiguous()
    grad_qkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return grad_qkv
    first, rest = split_head(head_dim)
    shared = {
        "D": head_dim, "D0": first, "D1": rest, "ACC": accumulator(qkv.dtype), "PRECISION": _precision(qkv.dtype),
    }  # fmt: skip
    scale, scale2 = head_dim**-0.5, head_dim**-0.5 * math.log2(math.e)
    key = (qkv.device, qkv.dtype, tokens, head_dim)
    config = tile("attention_backward_one_tile", *key)
    if tokens <= config["rows"]:
        heads = math.gcd(config["heads"], num_heads)
        launch(
            backward_one_tile_kernel, batch * num_heads // heads, qkv,
            qkv, out, grad, lse, grad_qkv, tokens, num_heads, num_heads // heads, scale, scale2,
            ROWS=config["rows"], HEADS=heads, num_warps=config["warps"], num_stages=config["stages"], **shared,
        )  # fmt: skip
        return grad_qkv
    delta = torch.empty_like(lse)
    blocks = triton.cdiv(tokens, 32)
    launch(
        delta_kernel, batch * num_heads * blocks, qkv,
        out, grad, delta, tokens, num_heads, blocks,
        D=head_dim, COLS=max(16, triton.next_power_of_2(head_dim)), ROWS=32, ACC=accumulator(qkv.dtype),
    )  # fmt: skip
    for kernel, name in ((backward_kv_kernel, "attention_backward_kv"), (backward_q_kernel, "attention_backward_q")):
        config = tile(name, *key)
        blocks = triton.cdiv(tokens, config["rows"])
        launch(
            kernel, batch * num_heads * blocks, qkv,
            qkv, grad, lse, delta, grad_qkv, tokens, num_heads, blocks, scale, scale2,
            ROWS=config["rows"], STEP=config["step"], num_warps=config["warps"], num_stages=config["stages"],
            **shared,
        )  # fmt: skip
    return grad_qkv
