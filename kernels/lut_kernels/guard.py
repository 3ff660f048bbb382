"""A memory check that needs no tool: launches on copies of their tensors with guard zones around, and in the gaps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lut_kernels.runtime import surround_launches

ZONE = 4096  # bytes before and after, a multiple of any alignment a kernel may count on
FILLS = (0xFF, 0x3C)  # NaN or huge floats and negative indices; small floats and huge indices


class Guarded:
    """A copy of a tensor, same shape and strides, alone in a buffer filled with one byte value."""

    def __init__(self, tensor: Tensor, fill: int) -> None:
        self.tensor, self.fill = tensor, fill
        self.buffer = self._filled()
        self.copy = self._place(self.buffer)
        self.copy.copy_(tensor.detach())

    def _span(self) -> int:
        if self.tensor.numel() == 0:
            return 0
        pairs = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        return (1 + sum((size - 1) * stride for size, stride in pairs)) * self.tensor.element_size()

    def _filled(self) -> Tensor:
        size = self._span() + 2 * ZONE
        return torch.full((size,), self.fill, dtype=torch.uint8, device=self.tensor.device)

    def _place(self, buffer: Tensor) -> Tensor:
        inner = buffer[ZONE : ZONE + self._span()].view(self.tensor.dtype)
        return inner.as_strided(self.tensor.shape, self.tensor.stride(), inner.storage_offset())

    def intact(self) -> bool:
        """Whether every byte that is no element still has the fill's value."""
        expected = self._filled()
        self._place(expected).copy_(self.copy)
        return torch.equal(expected, self.buffer)

    def give_back(self) -> None:
        """What the kernel wrote, to the tensor it was meant for; an input, which may be saved for a backward, is left."""
        before = self._filled()
        self._place(before).copy_(self.tensor.detach())
        if not torch.equal(before, self.buffer):
            self.tensor.data.copy_(self.copy)


@contextmanager
def guarded_launches(fill: int) -> Iterator[list[str]]:
    """Run launches on guarded copies; yields the list that faults are added to, one line each.

    A write outside a tensor is such a fault. A read outside shows where results differ between two values of `fill`
    (0 to 255; the first tensor's, one less for each that follows). A read whose value is not used does not show: that
    takes compute-sanitizer, or an interpreted run.
    """
    faults: list[str] = []

    @contextmanager
    def surround(kernel: Any, args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        guards: dict[Any, Guarded] = {}

        def guard(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in guards:
                # a fill of its own: a copy from one zone into another must show
                guards[key] = Guarded(value, (fill - len(guards)) % 256)
            return guards[key].copy

        yield tuple(guard(value) for value in args)
        for index, one in enumerate(guards.values()):
            if not one.intact():
                faults.append(f"{kernel.__name__}: wrote outside its tensor {index}")
            one.give_back()

    with surround_launches(surround):
        yield faults
