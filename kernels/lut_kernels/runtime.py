"""What every Triton launcher needs: interpreter or device, accumulator type, tile widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

# Fixed when triton is imported: under TRITON_INTERPRET=1 every kernel of the process runs on the CPU, in Python.
INTERPRETED: bool = triton.knobs.runtime.interpret


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type sums are taken in: fp32, and fp64 for fp64 tensors (gradient checks)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@dataclass
class Launch:
    """One kernel launch: what an ahead-of-time compiler needs to build the same binary."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass
class Recording:
    """Launches noted instead of run, as on this architecture."""

    architecture: str
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None


@contextmanager
def record_launches(architecture: str) -> Iterator[Recording]:
    """Inside, launchers given tensors on the `meta` device note their launches for `resources` and run nothing."""
    global _recording
    _recording = Recording(architecture)
    try:
        yield _recording
    finally:
        _recording = None


def recording() -> Recording | None:
    """The recording in force, if any."""
    return _recording


Surround = Callable[[Any, tuple[Any, ...]], AbstractContextManager[tuple[Any, ...]]]

_surround: Surround | None = None


@contextmanager
def surround_launches(surround: Surround) -> Iterator[None]:
    """Inside, every launch runs within `surround(kernel, args)`, on the arguments that yields: for memory checks."""
    global _surround
    before, _surround = _surround, surround
    try:
        yield
    finally:
        _surround = before


def launch(kernel: Any, programs: int, on: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Run `programs` programs of a kernel on the device of `on`; Triton itself would take the current device."""
    if _recording is not None:
        _recording.launches.append(Launch(kernel, args, constants))
        return
    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        if _surround is None:
            kernel[(programs,)](*args, **constants)
            return
        with _surround(kernel, args) as given:
            kernel[(programs,)](*given, **constants)


def batch_strided(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where only the batch dimension is strided (a slice of stacked views), else a packed copy."""
    packed = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:])):
        if size != 1 and stride != packed:
            return tensor.contiguous()
        packed *= size
    return tensor


def column_block(width: int) -> int:
    """Tile width for rows of `width` values: the largest power of two that divides it, or one that covers it."""
    divisor = width & -width
    return min(divisor, 1024) if divisor >= 64 else min(triton.next_power_of_2(width), 1024)
