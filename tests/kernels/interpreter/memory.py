"""A memory and race checker for interpreted kernels: every address of every access, program by program.

A read or write must hit an element of a tensor that was handed to the kernel: not a neighbour, not a gap of a strided view.
Two programs must not touch the same element where one of them writes it, or the result would depend on their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

NOBODY, SHARED = -1, -2


class Region:
    """One tensor: the addresses of its elements, and which program read or wrote each."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.start, self.step = tensor.data_ptr(), tensor.element_size()
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        self.count = span if tensor.numel() else 0
        self.element: np.ndarray | None = None
        if tensor.numel() < self.count <= 2**24:
            self.element = np.zeros(self.count, bool)
            np.lib.stride_tricks.as_strided(self.element, tensor.shape, tensor.stride())[...] = True
        elif tensor.numel() < self.count:  # too many to mark: rows of the first dimension, each without gaps
            self.row = (tensor.stride(0), tensor[0].numel())
        self.writer = self.reader = np.zeros(0, np.int64)

    def holds(self, address: np.ndarray) -> np.ndarray:
        """Which addresses are those of elements."""
        offset = address.astype(np.int64) - self.start
        index = offset // self.step
        inside = (offset >= 0) & (offset % self.step == 0) & (index < self.count)
        if self.element is not None:
            inside[inside] = self.element[index[inside]]
        elif hasattr(self, "row"):
            inside &= index % self.row[0] < self.row[1]
        return inside

    def note(self, address: np.ndarray, program: int, write: bool) -> bool:
        """Remember who was here; False where another program's access clashes with this one."""
        if not len(self.writer):
            self.writer, self.reader = (np.full(self.count, NOBODY, np.int64) for _ in range(2))
        index = (address.astype(np.int64) - self.start) // self.step
        writer, reader = self.writer[index], self.reader[index]
        clash = (writer != NOBODY) & (writer != program)
        if write:
            clash |= (reader != NOBODY) & (reader != program)
            self.writer[index] = program
        else:
            self.reader[index] = np.where((reader == NOBODY) | (reader == program), program, SHARED)
        return not clash.any()


@dataclass
class Checker:
    """What was seen: names of the kernels run, programs run, elements read and written."""

    kernels: set[str] = field(default_factory=set)
    programs: int = 0
    reads: int = 0
    writes: int = 0
    kernel: str = ""
    program: int = 0
    regions: list[Region] = field(default_factory=list)

    def enter(self, executor: Any, arguments: tuple[Any, ...]) -> None:
        """A kernel starts with these arguments."""
        self.kernel = executor.fn.__name__
        self.kernels.add(self.kernel)
        tensors = {(one.data_ptr(), one.shape): one for one in arguments if isinstance(one, torch.Tensor)}
        self.regions = [Region(tensor) for tensor in tensors.values()]

    def access(self, pointers: np.ndarray, mask: np.ndarray, write: bool, races: bool) -> None:
        """One load or store of the running program."""
        address = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))
        address = address[np.broadcast_to(mask, address.shape)].ravel()
        if write and len(np.unique(address)) < len(address):
            raise AssertionError(f"{self.kernel}: program {self.program} writes one element twice in one store")
        known = np.zeros(len(address), bool)
        for region in self.regions:
            here = region.holds(address)
            known |= here
            if races and here.any() and not region.note(address[here], self.program, write):
                raise AssertionError(f"{self.kernel}: program {self.program} touches what another one writes")
        if not known.all():
            what = "writes" if write else "reads"
            raise AssertionError(f"{self.kernel}: program {self.program} {what} {np.sum(~known)} elements of no tensor")
        self.reads, self.writes = self.reads + len(address) * (not write), self.writes + len(address) * write


@contextmanager
def checked_memory(dry: bool = False, only_last: bool = False) -> Iterator[Checker]:
    """Check every access of the kernels run inside.

    dry: compute addresses and touch nothing (loads give zeros), so that tensors may be larger than the memory.
    only_last: of every grid run the last program alone.
    """
    checker = Checker()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    call, restore = GridExecutor.__call__, GridExecutor._restore_args_dev
    set_index = InterpreterBuilder.set_grid_idx

    def checked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        checker.access(ptrs.data, mask.data, write=False, races=not dry)
        nothing = type(mask)(np.zeros_like(mask.data), mask.dtype) if dry else mask
        return load(self, ptrs, nothing, other, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        checker.access(ptrs.data, mask.data, write=True, races=not dry)
        return None if dry else store(self, ptrs, value, mask, *rest)

    def checked_call(self: Any, *arguments: Any, **constants: Any) -> Any:
        checker.enter(self, arguments)
        last = self.grid[0] - 1

        def placed(builder: Any, x: int, y: int, z: int) -> None:
            checker.program, checker.programs = (last if only_last else x), checker.programs + 1
            builder.grid_dim = (last + 1, 1, 1)
            set_index(builder, checker.program, y, z)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(InterpreterBuilder, "set_grid_idx", placed)
            self.grid = (1,) if only_last else self.grid
            return call(self, *arguments, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        patch.setattr(GridExecutor, "__call__", checked_call)
        # it copies every storage onto itself, and would fill memory that was only reserved
        patch.setattr(GridExecutor, "_restore_args_dev", (lambda *_: None) if dry else restore)
        yield checker


@contextmanager
def reversed_grids() -> Iterator[None]:
    """Run the programs of every grid from the last to the first."""
    set_index = InterpreterBuilder.set_grid_idx

    def backwards(builder: Any, x: int, y: int, z: int) -> None:
        size = builder.grid_dim
        set_index(builder, size[0] - 1 - x, size[1] - 1 - y, size[2] - 1 - z)

    assert interpreter_builder.__class__ is InterpreterBuilder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_idx", backwards)
        yield
