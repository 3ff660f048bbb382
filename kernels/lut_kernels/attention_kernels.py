"""Triton kernels of self-attention on packed qkv.

Head dims that are no power of two are covered by two tiles of D0 and D1 columns (80 = 64 + 16).
Scores are kept in base 2: `scale2` is log2(e) / sqrt(d), and the saved `lse` is log2 of the row's sum of exponentials.
"""

# mypy: disable-error-code=no-untyped-def
# (a jitted kernel has Triton's types, not Python's)

from __future__ import annotations

import triton
import triton.language as tl


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
