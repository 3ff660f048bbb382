"""Decoder unshuffle: visible tokens back to their places, mask tokens elsewhere, decoder positions added."""

from __future__ import annotations

import torch

from lut_kernels.checks import FLOATS, expect_device, expect_dtype, expect_shape


def _check(x: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_restore: torch.Tensor) -> None:
    expect_dtype("x", x.dtype, FLOATS)
    expect_shape("x", x, (None, None, None))
    batch, tokens, width = x.shape
    for name, table in (("mask_token", mask_token), ("pos_embed", pos_embed)):
        expect_dtype(name, table.dtype, FLOATS)
        expect_device(name, table, "x", x)
    expect_shape("mask_token", mask_token, (1, 1, width))
    expect_shape("pos_embed", pos_embed, (1, None, width))
    expect_dtype("ids_restore", ids_restore.dtype, (torch.int64,))
    expect_shape("ids_restore", ids_restore, (batch, pos_embed.shape[1] - 1))
    expect_device("ids_restore", ids_restore, "x", x)
    if tokens < 1 or tokens > pos_embed.shape[1]:
        raise ValueError(f"x: expected 1 to {pos_embed.shape[1]} tokens (cls and visible patches), found {tokens}")


def _reference(
    x: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_restore: torch.Tensor
) -> torch.Tensor:
    batch, tokens, width = x.shape
    # One source table a sample: cls, the visible tokens, one mask token; hidden places all point at the last row.
    source = torch.cat([x, mask_token.to(x.dtype).expand(batch, 1, width)], dim=1)
    rows = torch.cat([ids_restore.new_zeros(batch, 1), (ids_restore + 1).clamp(max=tokens)], dim=1)
    rows = rows + torch.arange(batch, device=x.device)[:, None] * (tokens + 1)
    full = torch.nn.functional.embedding(rows, source.flatten(0, 1))
    return (full + pos_embed).to(x.dtype)


def unshuffle_tokens(
    x: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_restore: torch.Tensor
) -> torch.Tensor:
    """Full token sequence [B, 1+L, D] in the dtype of x, positions added (the sum is taken in the wider dtype).

    x: float [B, 1+K, D], row 0 is cls, rows 1+k the visible patches in shuffle order; mask_token: [1, 1, D];
    pos_embed: [1, 1+L, D]; ids_restore: int64 [B, L], the shuffle position of every patch: below K means visible.
    Gradients flow to x, mask_token and pos_embed. Raises ValueError or TypeError naming the argument at fault.
    """
    _check(x, mask_token, pos_embed, ids_restore)
    return _reference(x, mask_token, pos_embed, ids_restore)
