"""Decoder unshuffle: visible tokens back to their places, mask tokens elsewhere, decoder positions added."""

# mypy: disable-error-code=no-untyped-def
# (a jitted kernel has Triton's types, not Python's)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lut_kernels.checks import FLOATS, expect_device, expect_dtype, expect_permutation, expect_shape
from lut_kernels.dispatch import choice, tile
from lut_kernels.runtime import INTERPRETED, accumulator, column_block, launch


@triton.jit
def unshuffle_kernel(
    x,
    mask_token,
    pos_embed,
    ids_restore,
    out,
    visible,
    patches,
    row_blocks,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: ROWS rows of the full sequence of one sample, all columns."""
    program = tl.program_id(0)
    sample = (program // row_blocks).to(tl.int64)
    rows = program % row_blocks * ROWS + tl.arange(0, ROWS)
    live = rows <= patches
    # Row 0 is cls, and comes from row 0 of x; patch l comes from row 1 + its shuffle position, if that is visible.
    place = tl.load(ids_restore + sample * patches + rows - 1, mask=live & (rows > 0), other=-1) + 1
    known = (rows == 0) | ((place >= 1) & (place <= patches))
    shown = live & known & (place <= visible)
    source = tl.where(shown, place, 0)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        token = tl.load(
            x + sample * (visible + 1) * WIDTH + source[:, None] * WIDTH + column[None, :],
            mask=shown[:, None] & inside[None, :],
            other=0,
        )
        hidden = tl.load(mask_token + column, mask=inside, other=0)
        offset = rows[:, None] * WIDTH + column[None, :]
        mask = live[:, None] & inside[None, :]
        pos = tl.load(pos_embed + offset, mask=mask, other=0)
        # the mask token takes the dtype of x first, as in the reference
        hidden = hidden.to(x.dtype.element_ty).to(ACC)
        total = tl.where(shown[:, None], token.to(ACC), hidden[None, :]) + pos.to(ACC)
        total = tl.where(known[:, None], total, float("nan"))
        tl.store(out + sample * (patches + 1) * WIDTH + offset, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def unshuffle_backward_kernel(
    grad,
    ids_restore,
    grad_x,
    grad_mask,
    visible,
    patches,
    column_blocks,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: all rows of one sample, BLOCK columns. Visible rows go back to their place, others are summed.

    A place out of range is written nowhere, and makes the sum NaN as it made its row in the forward.
    """
    program = tl.program_id(0)
    sample = (program // column_blocks).to(tl.int64)
    column = program % column_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, patches + 1, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows <= patches
        place = tl.load(ids_restore + sample * patches + rows - 1, mask=live & (rows > 0), other=-1) + 1
        known = (rows == 0) | ((place >= 1) & (place <= patches))
        shown = live & known & (place <= visible)
        value = tl.load(
            grad + sample * (patches + 1) * WIDTH + rows[:, None] * WIDTH + column[None, :],
            mask=live[:, None] & inside[None, :],
            other=0,
        )
        target = grad_x + sample * (visible + 1) * WIDTH + place[:, None] * WIDTH + column[None, :]
        tl.store(target, value, mask=shown[:, None] & inside[None, :])
        hidden = tl.where(known[:, None] | (rows > patches)[:, None], value.to(ACC), float("nan"))
        total += tl.sum(tl.where(shown[:, None], 0.0, hidden), axis=0)
    tl.store(grad_mask + sample * WIDTH + column, total, mask=inside)


def launch_unshuffle(
    x: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_restore: torch.Tensor
) -> torch.Tensor:
    batch, tokens, width = x.shape
    patches = ids_restore.shape[1]
    out = x.new_empty((batch, 1 + patches, width))
    config = tile("unshuffle_tokens", x.device, x.dtype)
    block = column_block(width)
    rows = max(1, config["elements"] // block)
    row_blocks = triton.cdiv(1 + patches, rows)
    if out.numel() == 0:
        return out
    launch(
        unshuffle_kernel, batch * row_blocks, x,
        x.contiguous(), mask_token.contiguous(), pos_embed.contiguous(), ids_restore.contiguous(), out,
        tokens - 1, patches, row_blocks,
        WIDTH=width, ROWS=rows, BLOCK=block, ACC=accumulator(x.dtype),
        num_warps=config["warps"],
    )  # fmt: skip
    return out


def launch_unshuffle_backward(
    grad: torch.Tensor, ids_restore: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, full, width = grad.shape
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_x = grad.new_empty((batch, tokens, width))
    partial = grad.new_empty((batch, 1, width), dtype=wide)
    config = tile("unshuffle_tokens_backward", grad.device, grad.dtype)
    block = min(column_block(width), config["columns"])
    if grad.numel() > 0:
        launch(
            unshuffle_backward_kernel, batch * triton.cdiv(width, block), grad,
            grad.contiguous(), ids_restore.contiguous(), grad_x, partial,
            tokens - 1, full - 1, triton.cdiv(width, block),
            WIDTH=width, ROWS=config["rows"], BLOCK=block, ACC=accumulator(grad.dtype), num_warps=config["warps"],
        )  # fmt: skip
    return grad_x, partial.sum(0, keepdim=True)


def _reference(
    x: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_restore: torch.Tensor
) -> torch.Tensor:
    batch, tokens, width = x.shape
    # Wide from the start: the gradient of the mask token is a sum over all hidden places.
    wide = torch.promote_types(x.dtype, torch.float32)
    # One source table a sample: cls, the visible tokens, one mask token; hidden places all point at the last row.
    source = torch.cat([x.to(wide), mask_token.to(x.dtype).to(wide).expand(batch, 1, width)], dim=1)
    rows = torch.cat([ids_restore.new_zeros(batch, 1), (ids_restore + 1).clamp(max=tokens)], dim=1)
    rows = rows + torch.arange(batch, device=x.device)[:, None] * (tokens + 1)
    full = torch.nn.functional.embedding(rows, source.flatten(0, 1))
    return (full + pos_embed).to(x.dtype)


def _reference_backward(
    grad: torch.Tensor, ids_restore: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    width = grad.shape[2]
    shuffle = ids_restore.argsort(dim=1)
    in_shuffle_order = grad[:, 1:].gather(1, shuffle[:, :, None].expand(-1, -1, width))
    grad_x = torch.cat([grad[:, :1], in_shuffle_order[:, : tokens - 1]], dim=1)
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad_x, in_shuffle_order[:, tokens - 1 :].sum((0, 1), dtype=wide)[None, None]


@torch.library.custom_op("lut_kernels::unshuffle_tokens", mutates_args=())
def unshuffle_op(
    x: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_restore: torch.Tensor
) -> torch.Tensor:
    """The operator behind `unshuffle_tokens`."""
    return (launch_unshuffle if INTERPRETED else _reference)(x, mask_token, pos_embed, ids_restore)


@torch.library.custom_op("lut_kernels::unshuffle_tokens_backward", mutates_args=())
def unshuffle_backward_op(
    grad: torch.Tensor, ids_restore: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x [B, 1+K, D], of the mask token [1, 1, D] in fp32 or wider). No atomics: always the same."""
    return (launch_unshuffle_backward if INTERPRETED else _reference_backward)(grad, ids_restore, tokens)


unshuffle_op.register_kernel("cuda")(launch_unshuffle)
unshuffle_backward_op.register_kernel("cuda")(launch_unshuffle_backward)


@unshuffle_op.register_fake
def _(x: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], 1 + ids_restore.shape[1], x.shape[2]))


@unshuffle_backward_op.register_fake
def _(grad: torch.Tensor, ids_restore: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    width = grad.shape[2]
    return grad.new_empty((grad.shape[0], tokens, width)), grad.new_empty((1, 1, width), dtype=wide)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, mask_token, pos_embed, ids_restore = inputs
    ctx.save_for_backward(ids_restore)
    ctx.tokens, ctx.mask_dtype, ctx.pos_dtype = x.shape[1], mask_token.dtype, pos_embed.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (ids_restore,) = ctx.saved_tensors
    grad_x, grad_mask = unshuffle_backward_op(grad, ids_restore, ctx.tokens)
    grad_pos = None
    if ctx.needs_input_grad[2]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_pos = grad.sum(0, keepdim=True, dtype=wide).to(ctx.pos_dtype)
    return grad_x, grad_mask.to(ctx.mask_dtype), grad_pos, None


unshuffle_op.register_autograd(_backward, setup_context=_save)


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
    expect_permutation("ids_restore", ids_restore)


def unshuffle_tokens(
    x: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_restore: torch.Tensor
) -> torch.Tensor:
    """Full token sequence [B, 1+L, D] in the dtype of x, positions added (the sum is taken in the wider dtype).

    x: float [B, 1+K, D], row 0 is cls, rows 1+k the visible patches in shuffle order; mask_token: [1, 1, D];
    pos_embed: [1, 1+L, D]; ids_restore: int64 [B, L], the shuffle position of every patch (a permutation): below K
    means visible. Gradients flow to x, mask_token and pos_embed. Raises ValueError, TypeError or IndexError naming the
    argument. The values of ids_restore are looked at on a CPU only: on a GPU a value out of range gives a NaN row, and a
    NaN gradient of the mask token; a value found twice leaves the gradient of x undefined where another is missing.
    """
    _check(x, mask_token, pos_embed, ids_restore)
    side = unshuffle_op if choice("unshuffle_tokens", x.device, x.dtype) == "triton" else _reference
    return side(x, mask_token, pos_embed, ids_restore)
