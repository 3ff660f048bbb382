"""Token embed epilogue: add the position rows of the visible patches and prepend the cls row."""

# mypy: disable-error-code=no-untyped-def
# (a jitted kernel has Triton's types, not Python's)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lut_kernels.checks import FLOATS, expect_device, expect_dtype, expect_indices, expect_shape
from lut_kernels.dispatch import choice, tile
from lut_kernels.runtime import INTERPRETED, accumulator, column_block, launch


@triton.jit
def embed_kernel(
    x,
    cls_token,
    pos_embed,
    ids,
    out,
    kept,
    positions,
    row_blocks,
    WIDTH: tl.constexpr,
    HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: ROWS output rows of one sample, all columns. Output row 0 is cls, row 1+k is token k."""
    program = tl.program_id(0)
    sample = (program // row_blocks).to(tl.int64)
    rows = program % row_blocks * ROWS + tl.arange(0, ROWS)
    is_cls = rows == 0
    is_token = (rows > 0) & (rows <= kept)
    if HAS_IDS:
        patch = tl.load(ids + sample * kept + rows - 1, mask=is_token, other=0)
        known = is_cls | ((patch >= 0) & (patch < positions - 1))
        position = tl.where(is_cls, 0, patch + 1)
    else:
        position = rows.to(tl.int64)
        known = position < positions
    position = tl.where(known, position, 0)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        mask = is_token[:, None] & inside[None, :]
        token = tl.load(x + sample * kept * WIDTH + (rows - 1)[:, None] * WIDTH + column[None, :], mask=mask, other=0)
        cls_row = tl.load(cls_token + column, mask=inside, other=0)
        pos = tl.load(
            pos_embed + position[:, None] * WIDTH + column[None, :], mask=(is_token | is_cls)[:, None] & inside[None, :]
        )
        total = tl.where(is_cls[:, None], cls_row.to(ACC)[None, :], token.to(ACC)) + pos.to(ACC)
        total = tl.where(known[:, None], total, float("nan"))
        target = out + sample * (kept + 1) * WIDTH + rows[:, None] * WIDTH + column[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=(rows <= kept)[:, None] & inside[None, :])


def launch_embed(
    x: torch.Tensor, cls_token: torch.Tensor, pos_embed: torch.Tensor, ids: torch.Tensor | None
) -> torch.Tensor:
    batch, kept, width = x.shape
    x = x.contiguous()
    out = x.new_empty((batch, kept + 1, width))
    config = tile("embed_tokens", x.device, x.dtype)
    block = column_block(width)
    rows = max(1, config["elements"] // block)
    row_blocks = triton.cdiv(kept + 1, rows)
    if out.numel() == 0:
        return out
    launch(
        embed_kernel, batch * row_blocks, x,
        x, cls_token.contiguous(), pos_embed.contiguous(), x if ids is None else ids.contiguous(), out,
        kept, pos_embed.shape[1], row_blocks,
        WIDTH=width, HAS_IDS=ids is not None, ROWS=rows, BLOCK=block,
        ACC=accumulator(x.dtype), num_warps=config["warps"],
    )  # fmt: skip
    return out


def _reference(
    x: torch.Tensor, cls_token: torch.Tensor, pos_embed: torch.Tensor, ids: torch.Tensor | None
) -> torch.Tensor:
    batch, _, width = x.shape
    if ids is None:
        rows = pos_embed[:, 1:]
    else:
        # embedding: its backward is the one torch parallelises over the table
        rows = torch.nn.functional.embedding(ids + 1, pos_embed[0])
    # expanded before the cast, so that the gradient of cls is summed over the batch in its own dtype
    cls_row = (cls_token + pos_embed[:, :1]).expand(batch, 1, width).to(x.dtype)
    return torch.cat([cls_row, (x + rows).to(x.dtype)], dim=1)


@torch.library.custom_op("lut_kernels::embed_tokens", mutates_args=())
def embed_op(
    x: torch.Tensor, cls_token: torch.Tensor, pos_embed: torch.Tensor, ids: torch.Tensor | None
) -> torch.Tensor:
    """The operator behind `embed_tokens`."""
    return (launch_embed if INTERPRETED else _reference)(x, cls_token, pos_embed, ids)


embed_op.register_kernel("cuda")(launch_embed)


@embed_op.register_fake
def _(x: torch.Tensor, cls_token: torch.Tensor, pos_embed: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1] + 1, x.shape[2]))


@torch.library.custom_op("lut_kernels::embed_tokens_backward_pos", mutates_args=())
def embed_backward_pos_op(grad: torch.Tensor, ids: torch.Tensor | None, positions: int) -> torch.Tensor:
    """Gradient [1, 1+L, D] of the position table, fp32 or wider: only where the table is trained. Deterministic."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if ids is None:
        return grad.sum(0, keepdim=True)
    # -1 is the padding index below: an id out of range must not reach a row of the table
    known = torch.where((ids >= 0) & (ids < positions - 1), ids + 1, -1)
    rows = torch.cat([ids.new_zeros(ids.shape[0], 1), known], dim=1)
    # sorted, not atomic: the same sum every time
    return torch.ops.aten.embedding_dense_backward(grad, rows, positions, -1, False)[None]


@embed_backward_pos_op.register_fake
def _(grad: torch.Tensor, ids: torch.Tensor | None, positions: int) -> torch.Tensor:
    return grad.new_empty((1, positions, grad.shape[2]), dtype=torch.promote_types(grad.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cls_token, pos_embed, ids = inputs
    ctx.save_for_backward(ids)
    ctx.cls_dtype, ctx.pos_dtype, ctx.positions = cls_token.dtype, pos_embed.dtype, pos_embed.shape[1]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    grad_x = grad_cls = grad_pos = None
    if ctx.needs_input_grad[0]:
        grad_x = grad[:, 1:]  # a view: no kernel can be cheaper
    if ctx.needs_input_grad[1]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_cls = grad[:, :1].sum(0, keepdim=True, dtype=wide).to(ctx.cls_dtype)
    if ctx.needs_input_grad[2]:
        grad_pos = embed_backward_pos_op(grad, ids, ctx.positions).to(ctx.pos_dtype)
    return grad_x, grad_cls, grad_pos, None


embed_op.register_autograd(_backward, setup_context=_save)


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
    expect_indices("ids", ids, pos_embed.shape[1] - 1)


def embed_tokens(
    x: torch.Tensor, cls_token: torch.Tensor, pos_embed: torch.Tensor, ids: torch.Tensor | None
) -> torch.Tensor:
    """[cls + pos 0, x_k + pos 1+ids_k ...] as [B, 1+K, D] in the dtype of x; the sums are taken in the wider dtype.

    x: float [B, K, D]; cls_token: [1, 1, D]; pos_embed: [1, 1+L, D], row 0 belongs to cls; ids: int64 [B, K] patch
    indices, or None for all L patches in order. Gradients flow to x, cls_token and pos_embed (where it is trained).
    Raises ValueError, TypeError or IndexError naming the argument at fault. The values of ids are looked at on a CPU
    only: on a GPU an id out of range gives a NaN row, and no gradient to the table.
    """
    _check(x, cls_token, pos_embed, ids)
    side = embed_op if choice("embed_tokens", x.device, x.dtype) == "triton" else _reference
    return side(x, cls_token, pos_embed, ids)
