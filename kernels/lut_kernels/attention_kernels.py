"""Triton kernels of self-attention on packed qkv, and their launchers.

Head dims that are no power of two are covered by two tiles (80 = 64 + 16), not by one padded to the next power.
Scores are kept in base 2: `scale2` is log2(e) / sqrt(d), and the saved `lse` is log2 of the row's sum of exponentials.
"""

# mypy: disable-error-code=no-untyped-def
# (a jitted kernel has Triton's types, not Python's)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from lut_kernels.dispatch import tile
from lut_kernels.runtime import accumulator, on_device_of


@triton.jit
def _tile(base, rows, stride, count, START: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [T] x columns START .. START+COLS of a matrix; zeros past `count` rows and past WIDTH columns."""
    column = START + tl.arange(0, COLS)
    mask = (rows < count)[:, None]
    if START + COLS > WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _put(base, value, rows, stride, count, START: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    column = START + tl.arange(0, COLS)
    mask = (rows < count)[:, None]
    if START + COLS > WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(base + rows[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a, b, out_dtype=ACC, input_precision=PRECISION)


@triton.jit
def forward_kernel(
    qkv,
    out,
    lse,
    tokens,
    heads,
    head_groups,
    row_blocks,
    scale2,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    SAVE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: ROWS queries of HEADS heads of one sequence, against all keys in steps of STEP (online softmax)."""
    program = tl.program_id(0)
    rows = program % row_blocks * ROWS + tl.arange(0, ROWS)
    group = program // row_blocks
    sequence = (group // head_groups).to(tl.int64)
    width = heads * D
    stride = 3 * width
    for index in range(HEADS):
        head = group % head_groups * HEADS + index
        q_base = qkv + sequence * tokens * stride + head * D
        k_base = q_base + width
        v_base = k_base + width
        q0 = _tile(q_base, rows, stride, tokens, 0, D0, D)
        acc0 = tl.zeros([ROWS, D0], dtype=ACC)
        if D1 > 0:
            q1 = _tile(q_base, rows, stride, tokens, D0, D1, D)
            acc1 = tl.zeros([ROWS, D1], dtype=ACC)
        top = tl.full([ROWS], float("-inf"), dtype=ACC)
        total = tl.zeros([ROWS], dtype=ACC)
        for start in range(0, tokens, STEP):
            keys = start + tl.arange(0, STEP)
            score = _dot(q0, tl.trans(_tile(k_base, keys, stride, tokens, 0, D0, D)), ACC, PRECISION)
            if D1 > 0:
                score += _dot(q1, tl.trans(_tile(k_base, keys, stride, tokens, D0, D1, D)), ACC, PRECISION)
            score = tl.where((keys < tokens)[None, :], score * scale2, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, axis=1))
            weight = tl.exp2(score - new_top[:, None])
            decay = tl.exp2(top - new_top)
            top = new_top
            total = total * decay + tl.sum(weight, axis=1)
            v0 = _tile(v_base, keys, stride, tokens, 0, D0, D)
            weight = weight.to(v0.dtype)
            acc0 = acc0 * decay[:, None] + _dot(weight, v0, ACC, PRECISION)
            if D1 > 0:
                v1 = _tile(v_base, keys, stride, tokens, D0, D1, D)
                acc1 = acc1 * decay[:, None] + _dot(weight, v1, ACC, PRECISION)
        out_base = out + sequence * tokens * width + head * D
        _put(out_base, acc0 / total[:, None], rows, width, tokens, 0, D0, D)
        if D1 > 0:
            _put(out_base, acc1 / total[:, None], rows, width, tokens, D0, D1, D)
        if SAVE:
            tl.store(lse + (sequence * heads + head) * tokens + rows, top + tl.log2(total), mask=rows < tokens)


@triton.jit
def delta_kernel(
    out,
    grad,
    delta,
    tokens,
    heads,
    row_blocks,
    D: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """delta[b, h, n] = sum over the head of out * grad: the softmax's part of the backward."""
    program = tl.program_id(0)
    rows = program % row_blocks * ROWS + tl.arange(0, ROWS)
    group = program // row_blocks
    sequence = (group // heads).to(tl.int64)
    head = group % heads
    base = sequence * tokens * heads * D + head * D
    o = _tile(out + base, rows, heads * D, tokens, 0, COLS, D)
    g = _tile(grad + base, rows, heads * D, tokens, 0, COLS, D)
    value = tl.sum(o.to(ACC) * g.to(ACC), axis=1)
    tl.store(delta + (sequence * heads + head) * tokens + rows, value, mask=rows < tokens)


@triton.jit
def backward_one_tile_kernel(
    qkv,
    out,
    grad,
    lse,
    grad_qkv,
    tokens,
    heads,
    head_groups,
    scale,
    scale2,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: HEADS whole heads of one sequence that fits a tile; everything is read once and written once."""
    group = tl.program_id(0)
    sequence = (group // head_groups).to(tl.int64)
    rows = tl.arange(0, ROWS)
    width = heads * D
    stride = 3 * width
    for index in range(HEADS):
        head = group % head_groups * HEADS + index
        place = sequence * tokens * stride + head * D
        q0 = _tile(qkv + place, rows, stride, tokens, 0, D0, D)
        k0 = _tile(qkv + place + width, rows, stride, tokens, 0, D0, D)
        v0 = _tile(qkv + place + 2 * width, rows, stride, tokens, 0, D0, D)
        flat = sequence * tokens * width + head * D
        g0 = _tile(grad + flat, rows, width, tokens, 0, D0, D)
        o0 = _tile(out + flat, rows, width, tokens, 0, D0, D)
        score = _dot(q0, tl.trans(k0), ACC, PRECISION)
        grad_weight = _dot(g0, tl.trans(v0), ACC, PRECISION)
        delta = tl.sum(o0.to(ACC) * g0.to(ACC), axis=1)
        if D1 > 0:
            q1 = _tile(qkv + place, rows, stride, tokens, D0, D1, D)
            k1 = _tile(qkv + place + width, rows, stride, tokens, D0, D1, D)
            v1 = _tile(qkv + place + 2 * width, rows, stride, tokens, D0, D1, D)
            g1 = _tile(grad + flat, rows, width, tokens, D0, D1, D)
            o1 = _tile(out + flat, rows, width, tokens, D0, D1, D)
            score += _dot(q1, tl.trans(k1), ACC, PRECISION)
            grad_weight += _dot(g1, tl.trans(v1), ACC, PRECISION)
            delta += tl.sum(o1.to(ACC) * g1.to(ACC), axis=1)
        row_lse = tl.load(lse + (sequence * heads + head) * tokens + rows, mask=rows < tokens, other=0.0)
        # Rows past the end have zero gradients; columns past the end must not overflow, so they are set to zero.
        weight = tl.where((rows < tokens)[None, :], tl.exp2(score * scale2 - row_lse[:, None]), 0.0)
        grad_score = (weight * (grad_weight - delta[:, None]) * scale).to(q0.dtype)
        weight = weight.to(q0.dtype)
        _put(grad_qkv + place, _dot(grad_score, k0, ACC, PRECISION), rows, stride, tokens, 0, D0, D)
        _put(grad_qkv + place + width, _dot(tl.trans(grad_score), q0, ACC, PRECISION), rows, stride, tokens, 0, D0, D)
        _put(grad_qkv + place + 2 * width, _dot(tl.trans(weight), g0, ACC, PRECISION), rows, stride, tokens, 0, D0, D)
        if D1 > 0:
            _put(grad_qkv + place, _dot(grad_score, k1, ACC, PRECISION), rows, stride, tokens, D0, D1, D)
            grad_k = _dot(tl.trans(grad_score), q1, ACC, PRECISION)
            _put(grad_qkv + place + width, grad_k, rows, stride, tokens, D0, D1, D)
            grad_v = _dot(tl.trans(weight), g1, ACC, PRECISION)
            _put(grad_qkv + place + 2 * width, grad_v, rows, stride, tokens, D0, D1, D)


@triton.jit
def backward_kv_kernel(
    qkv,
    grad,
    lse,
    delta,
    grad_qkv,
    tokens,
    heads,
    row_blocks,
    scale,
    scale2,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of ROWS keys and values of one head, over all queries in steps of STEP."""
    program = tl.program_id(0)
    keys = program % row_blocks * ROWS + tl.arange(0, ROWS)
    group = program // row_blocks
    sequence = (group // heads).to(tl.int64)
    head = group % heads
    width = heads * D
    stride = 3 * width
    place = sequence * tokens * stride + head * D
    flat = sequence * tokens * width + head * D
    line = (sequence * heads + head) * tokens
    k0 = _tile(qkv + place + width, keys, stride, tokens, 0, D0, D)
    v0 = _tile(qkv + place + 2 * width, keys, stride, tokens, 0, D0, D)
    grad_k0 = tl.zeros([ROWS, D0], dtype=ACC)
    grad_v0 = tl.zeros([ROWS, D0], dtype=ACC)
    if D1 > 0:
        k1 = _tile(qkv + place + width, keys, stride, tokens, D0, D1, D)
        v1 = _tile(qkv + place + 2 * width, keys, stride, tokens, D0, D1, D)
        grad_k1 = tl.zeros([ROWS, D1], dtype=ACC)
        grad_v1 = tl.zeros([ROWS, D1], dtype=ACC)
    for start in range(0, tokens, STEP):
        rows = start + tl.arange(0, STEP)
        q0 = _tile(qkv + place, rows, stride, tokens, 0, D0, D)
        g0 = _tile(grad + flat, rows, width, tokens, 0, D0, D)
        score = _dot(k0, tl.trans(q0), ACC, PRECISION)
        grad_weight = _dot(v0, tl.trans(g0), ACC, PRECISION)
        if D1 > 0:
            q1 = _tile(qkv + place, rows, stride, tokens, D0, D1, D)
            g1 = _tile(grad + flat, rows, width, tokens, D0, D1, D)
            score += _dot(k1, tl.trans(q1), ACC, PRECISION)
            grad_weight += _dot(v1, tl.trans(g1), ACC, PRECISION)
        row_lse = tl.load(lse + line + rows, mask=rows < tokens, other=0.0)
        row_delta = tl.load(delta + line + rows, mask=rows < tokens, other=0.0)
        # Queries past the end have zero q and zero gradients; keys past the end spoil only rows that are not stored.
        weight = tl.exp2(score * scale2 - row_lse[None, :])
        grad_score = (weight * (grad_weight - row_delta[None, :])).to(q0.dtype)
        weight = weight.to(q0.dtype)
        grad_v0 += _dot(weight, g0, ACC, PRECISION)
        grad_k0 += _dot(grad_score, q0, ACC, PRECISION)
        if D1 > 0:
            grad_v1 += _dot(weight, g1, ACC, PRECISION)
            grad_k1 += _dot(grad_score, q1, ACC, PRECISION)
    _put(grad_qkv + place + width, grad_k0 * scale, keys, stride, tokens, 0, D0, D)
    _put(grad_qkv + place + 2 * width, grad_v0, keys, stride, tokens, 0, D0, D)
    if D1 > 0:
        _put(grad_qkv + place + width, grad_k1 * scale, keys, stride, tokens, D0, D1, D)
        _put(grad_qkv + place + 2 * width, grad_v1, keys, stride, tokens, D0, D1, D)


@triton.jit
def backward_q_kernel(
    qkv,
    grad,
    lse,
    delta,
    grad_qkv,
    tokens,
    heads,
    row_blocks,
    scale,
    scale2,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of ROWS queries of one head, over all keys in steps of STEP."""
    program = tl.program_id(0)
    rows = program % row_blocks * ROWS + tl.arange(0, ROWS)
    group = program // row_blocks
    sequence = (group // heads).to(tl.int64)
    head = group % heads
    width = heads * D
    stride = 3 * width
    place = sequence * tokens * stride + head * D
    flat = sequence * tokens * width + head * D
    line = (sequence * heads + head) * tokens
    q0 = _tile(qkv + place, rows, stride, tokens, 0, D0, D)
    g0 = _tile(grad + flat, rows, width, tokens, 0, D0, D)
    grad_q0 = tl.zeros([ROWS, D0], dtype=ACC)
    if D1 > 0:
        q1 = _tile(qkv + place, rows, stride, tokens, D0, D1, D)
        g1 = _tile(grad + flat, rows, width, tokens, D0, D1, D)
        grad_q1 = tl.zeros([ROWS, D1], dtype=ACC)
    row_lse = tl.load(lse + line + rows, mask=rows < tokens, other=0.0)
    row_delta = tl.load(delta + line + rows, mask=rows < tokens, other=0.0)
    for start in range(0, tokens, STEP):
        keys = start + tl.arange(0, STEP)
        k0 = _tile(qkv + place + width, keys, stride, tokens, 0, D0, D)
        v0 = _tile(qkv + place + 2 * width, keys, stride, tokens, 0, D0, D)
        score = _dot(q0, tl.trans(k0), ACC, PRECISION)
        grad_weight = _dot(g0, tl.trans(v0), ACC, PRECISION)
        if D1 > 0:
            k1 = _tile(qkv + place + width, keys, stride, tokens, D0, D1, D)
            v1 = _tile(qkv + place + 2 * width, keys, stride, tokens, D0, D1, D)
            score += _dot(q1, tl.trans(k1), ACC, PRECISION)
            grad_weight += _dot(g1, tl.trans(v1), ACC, PRECISION)
        weight = tl.where((keys < tokens)[None, :], tl.exp2(score * scale2 - row_lse[:, None]), 0.0)
        grad_score = (weight * (grad_weight - row_delta[:, None])).to(q0.dtype)
        grad_q0 += _dot(grad_score, k0, ACC, PRECISION)
        if D1 > 0:
            grad_q1 += _dot(grad_score, k1, ACC, PRECISION)
    _put(grad_qkv + place, grad_q0 * scale, rows, stride, tokens, 0, D0, D)
    if D1 > 0:
        _put(grad_qkv + place, grad_q1 * scale, rows, stride, tokens, D0, D1, D)


def split_head(head_dim: int) -> tuple[int, int]:
    """(D0, D1): tile widths, powers of two from 16, that cover the head dim with the fewest columns; D1 may be 0."""
    whole = max(16, triton.next_power_of_2(head_dim))
    first = whole // 2
    rest = max(16, triton.next_power_of_2(max(head_dim - first, 1)))
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


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
    with on_device_of(qkv):
        forward_kernel[(batch * (num_heads // heads) * row_blocks,)](
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
    config = tile("attention_backward", qkv.device, qkv.dtype, tokens, head_dim)
    with on_device_of(qkv):
        if tokens <= config["rows"]:
            heads = math.gcd(config["heads"], num_heads)
            backward_one_tile_kernel[(batch * num_heads // heads,)](
                qkv, out, grad, lse, grad_qkv, tokens, num_heads, num_heads // heads, scale, scale2,
                ROWS=config["rows"], HEADS=heads, num_warps=config["warps"], num_stages=config["stages"], **shared,
            )  # fmt: skip
            return grad_qkv
        delta = torch.empty_like(lse)
        blocks = triton.cdiv(tokens, 64)
        delta_kernel[(batch * num_heads * blocks,)](
            out, grad, delta, tokens, num_heads, blocks,
            D=head_dim, COLS=max(16, triton.next_power_of_2(head_dim)), ROWS=64, ACC=accumulator(qkv.dtype),
        )  # fmt: skip
        blocks = triton.cdiv(tokens, config["rows"])
        for kernel in (backward_kv_kernel, backward_q_kernel):
            kernel[(batch * num_heads * blocks,)](
                qkv, grad, lse, delta, grad_qkv, tokens, num_heads, blocks, scale, scale2,
                ROWS=config["rows"], STEP=config["step"], num_warps=config["warps"], num_stages=config["stages"],
                **shared,
            )  # fmt: skip
    return grad_qkv
