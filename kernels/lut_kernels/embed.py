"""Token embed epilogue: add the position rows of the visible patches and prepend the cls row."""

from __future__ import annotations

import torch

from lut_kernels.checks import FLOATS, expect_device, expect_dtype, expect_shape


def _check(x: torch.Tensor, cls_token: torch.Tensor, pos_embed: torch.Tensor, ids: torch.Tensor | None) -> None:
    expect_dtype("x", x.dtype, FLOATS)
    expect_shape("x", x, (None, None, None))
    batch, kept, width = x.shape
    for name, table in (("cls_token", cls_token), ("pos_embed", pos_embed)):
        expect_dtype(name, table.dtype, FLOATS)
        expect_device(name, table, "x", x)
    expect_shape("cls_token", cls_token, (1, 1, width))
    if ids is None:
        expect_shape("pos_embed", pos_embed, (1, 1 + kept, width))
        return
    expect_shape("pos_embed", pos_embed, (1, None, width))
    expect_dtype("ids", ids.dtype, (torch.int64,))
    expect_shape("ids", ids, (batch, kept))
    expect_device("ids", ids, "x", x)


def _reference(
    x: torch.Tensor, cls_token: torch.Tensor, pos_embed: torch.Tensor, ids: torch.Tensor | None
) -> torch.Tensor:
    batch, _, width = x.shape
    if ids is None:
        rows = pos_embed[:, 1:]
    else:
        # embedding: its backward is the one torch parallelises over the table
        rows = torch.nn.functional.embedding(ids + 1, pos_embed[0])
    cls_row = (cls_token + pos_embed[:, :1]).to(x.dtype).expand(batch, 1, width)
    return torch.cat([cls_row, (x + rows).to(x.dtype)], dim=1)


def embed_tokens(
    x: torch.Tensor, cls_token: torch.Tensor, pos_embed: torch.Tensor, ids: torch.Tensor | None
) -> torch.Tensor:
    """[cls + pos 0, x_k + pos 1+ids_k ...] as [B, 1+K, D] in the dtype of x; the sums are taken in the wider dtype.

    x: float [B, K, D]; cls_token: [1, 1, D]; pos_embed: [1, 1+L, D], row 0 belongs to cls; ids: int64 [B, K] patch
    indices, or None for all L patches in order. Gradients flow to x, cls_token and pos_embed (where it is trained).
    Raises ValueError or TypeError naming the argument at fault.
    """
    _check(x, cls_token, pos_embed, ids)
    return _reference(x, cls_token, pos_embed, ids)
