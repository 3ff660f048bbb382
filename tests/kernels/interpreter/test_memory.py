"""Every kernel, interpreted, with each address checked: inside its tensors, no race, any order, more than 2**31 elements."""

from collections.abc import Callable

import pytest
import torch
from lut_kernels.attention_launch import launch_backward, launch_forward
from lut_kernels.embed import embed_backward_pos_op, launch_embed
from lut_kernels.gather import launch_gather
from lut_kernels.loss import launch_loss, launch_scale
from lut_kernels.unshuffle import launch_unshuffle, launch_unshuffle_backward
from torch import Tensor
from triton.runtime.errors import InterpreterError

from tests.kernels.interpreter.memory import checked_memory, reversed_grids
from tests.kernels.samples import normalised_chw, randn, random_ids, random_pixels

ONE, ZERO = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
Call = Callable[[], tuple[Tensor, ...]]


def last_view(batch: int, side: int) -> Tensor:
    """uint8 [B, S, S, 3]: the second of two stacked views, so that the first one lies in the gaps."""
    return random_pixels(2 * batch, side).unflatten(0, (batch, 2))[:, 1]


def gather(patch: int, grid: int, kept: int | None, floats: bool = False) -> Call:
    pixels = last_view(2, patch * grid)
    source = normalised_chw(pixels.contiguous()).half().contiguous() if floats else pixels
    ids = None if kept is None else random_ids(2, grid * grid, kept)
    return lambda: (launch_gather(source, ids, patch, ONE, ZERO, torch.float16),)


def loss(patch: int, grid: int, masked: int, norm_pix: bool) -> Call:
    pred, ids = randn(2, masked, 3 * patch**2, dtype=torch.float16), random_ids(2, grid * grid, masked)
    pixels = last_view(2, patch * grid)
    return lambda: launch_loss(pred, pixels, ids, patch, ONE, ZERO, norm_pix, True)


def scale(size: int) -> Call:
    def run() -> tuple[Tensor, ...]:
        grad = randn(size, dtype=torch.float16)
        launch_scale(grad, torch.tensor(0.5), 3.0)
        return (grad,)

    return run


def embed(width: int, patches: int, kept: int | None) -> Call:
    x, cls = randn(2, kept or patches, width, dtype=torch.float16), randn(1, 1, width, dtype=torch.float32)
    pos, ids = randn(1, 1 + patches, width, dtype=torch.float32), None if kept is None else random_ids(2, patches, kept)
    return lambda: (launch_embed(x, cls, pos, ids),)


def unshuffle(width: int, patches: int, kept: int) -> Call:
    x, mask = randn(2, 1 + kept, width, dtype=torch.float16), randn(1, 1, width, dtype=torch.float32)
    pos, restore = randn(1, 1 + patches, width, dtype=torch.float32), random_ids(2, patches, patches)
    return lambda: (launch_unshuffle(x, mask, pos, restore),)


def unshuffle_backward(width: int, patches: int, kept: int) -> Call:
    grad, restore = randn(2, 1 + patches, width, dtype=torch.float16), random_ids(2, patches, patches)
    return lambda: launch_unshuffle_backward(grad, restore, 1 + kept)


def attention(tokens: int, heads: int, head_dim: int) -> Call:
    qkv = randn(2, tokens, 3 * heads * head_dim, dtype=torch.float16)
    grad = randn(2, tokens, heads * head_dim, seed=1, dtype=torch.float16)

    def run() -> tuple[Tensor, ...]:
        out, lse = launch_forward(qkv, heads, True)
        return out, lse, launch_backward(grad, qkv, out, lse, heads)

    return run


# Sizes that leave a part of the last tile empty in every dimension, and some that fill it.
CALLS: dict[str, tuple[Call, set[str]]] = {
    "gather some": (gather(5, 3, 7), {"gather_kernel"}),
    "gather all": (gather(14, 2, None), {"gather_kernel"}),
    "gather whole tiles": (gather(16, 3, None), {"gather_kernel"}),
    "gather floats": (gather(5, 3, 7, floats=True), {"gather_kernel"}),
    "loss": (loss(14, 2, 3, True), {"loss_kernel"}),
    "loss raw": (loss(5, 3, 9, False), {"loss_kernel"}),
    "scale": (scale(5000), {"scale_kernel"}),
    "embed": (embed(40, 33, 17), {"embed_kernel"}),
    "embed wide": (embed(1300, 5, None), {"embed_kernel"}),
    "unshuffle": (unshuffle(40, 130, 33), {"unshuffle_kernel"}),
    "unshuffle wide": (unshuffle(1300, 5, 0), {"unshuffle_kernel"}),
    "unshuffle backward": (unshuffle_backward(40, 35, 9), {"unshuffle_backward_kernel"}),
    "unshuffle backward wide": (unshuffle_backward(300, 5, 5), {"unshuffle_backward_kernel"}),
    "attention one tile": (attention(50, 2, 80), {"forward_kernel", "backward_one_tile_kernel"}),
    "attention full tile": (attention(64, 1, 32), {"forward_kernel", "backward_one_tile_kernel"}),
    "attention": (
        attention(70, 2, 24),
        {"forward_kernel", "delta_kernel", "backward_kv_kernel", "backward_q_kernel"},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_access_is_inside_and_programs_do_not_meet(name: str) -> None:
    call, kernels = CALLS[name]
    with checked_memory() as seen:
        call()
    assert seen.kernels == kernels
    assert min(seen.programs, seen.reads, seen.writes) > 1


@pytest.mark.parametrize("name", CALLS)
def test_the_order_of_programs_does_not_matter(name: str) -> None:
    call, _ = CALLS[name]
    with reversed_grids():
        backwards = call()
    for one, other in zip(call(), backwards, strict=True):
        assert torch.equal(one, other)


WILD = torch.tensor([[-1, 0, 9, 2**31, -(2**63), 3, 2**63 - 1, 8, -2]])


def test_ids_out_of_range_reach_no_memory() -> None:
    pixels, x, table = last_view(1, 12), randn(1, 9, 24).half(), randn(1, 10, 24).half()
    pred = randn(1, 9, 48).half()
    with checked_memory() as seen:
        rows = launch_gather(pixels, WILD, 4, ONE, ZERO, torch.float32)
        tokens = launch_embed(x, table[:, :1], table, WILD)
        value, grad = launch_loss(pred, pixels, WILD, 4, ONE, ZERO, True, True)
        full = launch_unshuffle(x[:, :5], table[:, :1], table, WILD)
        grad_x, grad_mask = launch_unshuffle_backward(full, WILD, 5)
    assert len(seen.kernels) == 5
    bad = [not 0 <= one < 9 for one in WILD[0].tolist()]
    assert rows.isnan().all(-1)[0].tolist() == bad
    assert tokens.isnan().all(-1)[0].tolist() == [False, *bad]
    assert bool(value.isnan())
    assert grad.isnan().all(-1)[0].tolist() == bad
    assert full.isnan().all(-1)[0].tolist() == [False, *bad]
    assert bool(grad_mask.isnan().all())
    for place, patch in ((0, -1), (1, 1), (4, 5)):  # cls, and the two tokens that a patch did ask for
        assert torch.equal(grad_x[0, place], full[0, patch + 1])


def test_position_gradient_leaves_out_ids_out_of_range() -> None:
    grad = randn(1, 10, 4).float()
    found = embed_backward_pos_op(grad, WILD, 10)
    expected = torch.zeros(1, 10, 4)
    expected[0, 0] = grad[0, 0]
    for row, patch in enumerate(WILD[0].tolist()):
        if 0 <= patch < 9:
            expected[0, 1 + patch] += grad[0, 1 + row]
    assert torch.equal(found, expected)


HUGE = 2**31 + 2**20


def reserved(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor whose memory is never touched."""
    return torch.empty(shape, dtype=dtype)


def huge_pixels() -> Tensor:
    return reserved(HUGE // 2 // (32 * 32 * 3), 2, 32, 32, 3, dtype=torch.uint8)[:, 1]


def huge_ids(kept: int = 4) -> Tensor:
    return reserved(len(huge_pixels()), kept, dtype=torch.int64)


def huge_backward(tokens: int) -> object:
    batch = HUGE // (tokens * 256)
    qkv, flat, lse = reserved(batch, tokens, 3 * 256), reserved(batch, tokens, 256), torch.empty(batch, 4, tokens)
    return launch_backward(flat, qkv, reserved(batch, tokens, 256), lse, 4)


# Sizes just past 2**31, so that a wrapped offset is negative and not some other place inside.
LARGE: dict[str, Callable[[], object]] = {
    "gather reads": lambda: launch_gather(huge_pixels(), huge_ids(), 16, ONE, ZERO, torch.float16),
    "gather writes": lambda: launch_gather(
        reserved(HUGE // 3 // 1024, 32, 32, 3, dtype=torch.uint8), None, 16, ONE, ZERO, torch.float16
    ),
    "loss": lambda: launch_loss(
        reserved(HUGE // 3072, 4, 768), reserved(HUGE // 3072, 32, 32, 3, dtype=torch.uint8),
        reserved(HUGE // 3072, 4, dtype=torch.int64), 16, ONE, ZERO, True, True,
    ),
    "scale": lambda: launch_scale(reserved(HUGE), torch.tensor(0.5), 3.0),
    "embed": lambda: launch_embed(
        reserved(HUGE // 4096, 4, 1024), randn(1, 1, 1024).half(), randn(1, 5, 1024).half(),
        reserved(HUGE // 4096, 4, dtype=torch.int64),
    ),
    "unshuffle": lambda: launch_unshuffle(
        reserved(HUGE // 256, 4, 64), randn(1, 1, 64).half(), randn(1, 4, 64).half(),
        reserved(HUGE // 256, 3, dtype=torch.int64),
    ),
    "unshuffle backward": lambda: launch_unshuffle_backward(
        reserved(HUGE // 65536, 64, 1024), reserved(HUGE // 65536, 63, dtype=torch.int64), 64
    ),
    "attention backward in one tile": lambda: huge_backward(8),
    "attention backward": lambda: huge_backward(70),
    "attention forward": lambda: launch_forward(reserved(HUGE // 2048, 8, 768), 4, True),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_offsets_past_two_to_the_31(name: str) -> None:
    with checked_memory(dry=True, only_last=True) as seen:
        LARGE[name]()
    assert seen.programs >= 1
    assert seen.writes > 0


def test_the_checker_sees_what_it_should() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def copy_kernel(source, target, STEP: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0) * STEP + tl.arange(0, SIZE)
        tl.store(target + place, tl.load(source + place))

    source, target = torch.arange(8.0), torch.zeros(8)
    with checked_memory():
        copy_kernel[(2,)](source, target, STEP=4, SIZE=4)
    assert torch.equal(source, target)
    spaced = torch.zeros(2, 8)[:, :6]  # two elements of no tensor after each row
    for arguments, message in (
        ((source[:7], target, 4, 4), "reads 1 elements of no tensor"),
        ((source, target[1:], 4, 4), "writes 1 elements of no tensor"),
        ((spaced, spaced, 8, 8), "reads 2 elements of no tensor"),
        ((source, target, 2, 4), "touches what another one writes"),
        ((source, source, 2, 4), "touches what another one writes"),
    ):
        with pytest.raises(InterpreterError, match=message), checked_memory():
            copy_kernel[(2,)](*arguments)
