"""What every Triton launcher needs: interpreter or device, accumulator type, tile widths."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

# Fixed when triton is imported: under TRITON_INTERPRET=1 every kernel of the process runs on the CPU, in Python.
INTERPRETED: bool = triton.knobs.runtime.interpret


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type sums are taken in: fp32, and fp64 for fp64 tensors (gradient checks)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
