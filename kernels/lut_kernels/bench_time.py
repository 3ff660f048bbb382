"""Times on a GPU: device events, medians, inputs in rotation so that the L2 does not answer, random data."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton.errors import TritonError

from lut_kernels.bench_work import (
    Inputs,
    Work,
    attention_work,
    embed_work,
    gather_work,
    loss_work,
    unshuffle_work,
)
from lut_kernels.dispatch import forced_tiles, kernels_mode
from lut_kernels.tuning import HEADS, SPACE

# (calls, repeats) to microseconds of one call
Timer = Callable[[list[Callable[[], object]], int], float]

ROTATION_BYTES = 512 * 2**20  # several times the L2 of any device so far
SLEEP_CYCLES = 20_000_000  # about 10 ms: the host queues every call before the first one starts


@dataclass(frozen=True)
class Ceiling:
    """What this device was seen to reach: copy (read plus write) and bf16 matrix product."""

    copy_tb_s: float
    matmul_tflop_s: float


def time_calls(calls: list[Callable[[], object]], repeats: int = 5) -> float:
    """Median microseconds of one call, each call timed by events of its own."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats * len(calls))
    ]
    torch.cuda._sleep(SLEEP_CYCLES)
    for index, (start, end) in enumerate(events):
        start.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3


def ceiling(device: str) -> Ceiling:
    """Copy of 1 GiB and an 8192^3 product of random bf16."""
    source = torch.randint(0, 256, (2**30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_us = time_calls([lambda: target.copy_(source)], repeats=20)
    a, b = (torch.randn((8192, 8192), device=device).bfloat16() for _ in range(2))
    matmul_us = time_calls([lambda: a @ b], repeats=20)
    return Ceiling(round(2 * 2**30 / copy_us / 1e6, 3), round(2 * 8192**3 / matmul_us / 1e6, 1))


def floor_us(work: Work, top: Ceiling) -> float:
    """The time its bytes or its FLOPs need at the ceiling, whichever is longer."""
    return round(max(work.bytes / top.copy_tb_s, work.flops / top.matmul_tflop_s) / 1e6, 2)


def _once(work: Work, call: Callable[[Inputs], torch.Tensor], inputs: Inputs, upstream: torch.Tensor | None) -> object:
    out = call(inputs)
    if upstream is None:
        return out
    return torch.autograd.grad(out, [inputs[name] for name in work.leaves], upstream)


def _time_side(
    work: Work, call: Callable[[Inputs], torch.Tensor], sets: list[Inputs], upstream: torch.Tensor | None, timer: Timer
) -> float:
    calls: list[Callable[[], object]] = [
        lambda inputs=inputs: _once(work, call, inputs, upstream)  # type: ignore[misc]
        for inputs in sets
    ]
    return round(timer(calls, max(3, 24 // len(sets))), 2)


def input_sets(work: Work, device: str, dtype: torch.dtype) -> tuple[list[Inputs], torch.Tensor | None]:
    """Enough input sets to overflow the L2, and the upstream gradient where one is needed."""
    count = min(8, max(2, ROTATION_BYTES // max(work.bytes, 1)))
    sets = [work.make(device, dtype, seed) for seed in range(count)]
    for inputs in sets:
        for name in work.leaves:
            inputs[name].requires_grad_()
    if not work.leaves:
        return sets, None
    like = work.call(sets[0]).detach()
    return sets, torch.ones_like(like) if like.dim() == 0 else torch.randn_like(like)


def time_sides(work: Work, device: str, dtype: torch.dtype, timer: Timer = time_calls) -> dict[str, float]:
    """Microseconds of the kernel and of every library side that takes the shape; one that fails at it is left out."""
    sets, upstream = input_sets(work, device, dtype)
    sides: dict[str, Callable[[Inputs], torch.Tensor]] = {"triton": work.call, **work.library}
    found = {}
    for side, call in sides.items():
        with kernels_mode("triton" if side == "triton" else "torch"), torch.set_grad_enabled(bool(work.leaves)):
            try:
                found[side] = _time_side(work, call, sets, upstream, timer)
            except RuntimeError as error:
                if side in ("triton", "torch"):  # what the others are compared with
                    raise
                print(f"side left out: {work.name} {side}: {str(error).splitlines()[0]}")
    return found


def tuned_work(images: int) -> list[tuple[str, Work]]:
    """(tuning space, shape it is tuned at): ViT-L, and each length and head dim for attention."""
    found = [
        ("gather_patches", gather_work(2 * images, 16, 49)),
        ("embed_tokens", embed_work(2 * images, 1024, 196, 49)),
        ("unshuffle_tokens", unshuffle_work(images, 512, 196, 49, training=False)),
        ("unshuffle_tokens_backward", unshuffle_work(images, 512, 196, 49, training=True)),
        ("reconstruction_loss", loss_work(images, 16, 147)),
    ]
    for head_dim, lengths in ((32, (197, 257)), (64, (50, 197, 577)), (80, (65, 257, 577))):
        for tokens in lengths:
            heads = HEADS[head_dim]
            found.append(("attention_forward", attention_work(images, tokens, heads, head_dim, training=False)))
            work = attention_work(images, tokens, heads, head_dim, training=True)
            parts = ("one_tile",) if tokens <= 64 else ("kv", "q")
            found += [(f"attention_backward_{part}", work) for part in parts]
    return found


def tune(device: str, todo: list[tuple[str, Work]], timer: Timer = time_calls) -> list[dict[str, Any]]:
    """Time every tile of the named spaces at the shapes given, in bf16. A tile that does not fit the device is left out."""
    found = []
    for kernel, work in todo:
        sets, upstream = input_sets(work, device, torch.bfloat16)
        for tile in SPACE[kernel]:
            with forced_tiles({kernel: tile}), kernels_mode("triton"), torch.set_grad_enabled(bool(work.leaves)):
                try:
                    time_us = _time_side(work, work.call, sets, upstream, timer)
                except (TritonError, RuntimeError) as error:
                    print(f"tile left out: {kernel} {tile}: {str(error).splitlines()[0]}")
                    continue
            found.append(
                {
                    "kernel": kernel, "shape": work.name, "tokens": work.tokens, "head_dim": work.head_dim,
                    "tile": tile, "time_us": time_us,
                }
            )  # fmt: skip
    return found
