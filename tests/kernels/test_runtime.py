"""Launching, below the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from lut_kernels import runtime
from torch._subclasses.fake_tensor import FakeTensorMode


class Kernel:
    """Stands for a compiled kernel: notes the grid, and the CUDA device that is current when it runs."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, torch.device | None]] = []
        self.current: torch.device | None = None

    def __getitem__(self, grid: tuple[int]) -> object:
        return lambda *_, **__: self.seen.append((grid[0], self.current))


def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        before, kernel.current = kernel.current, device
        yield
        kernel.current = before

    monkeypatch.setattr(torch.cuda, "device", entered)
    with FakeTensorMode():  # no second GPU is needed to make a tensor that says it is there
        second = torch.empty(3, device="cuda:1")
    runtime.launch(kernel, 4, second, second)
    runtime.launch(kernel, 5, torch.empty(3), torch.empty(3))
    assert kernel.seen == [(4, torch.device("cuda:1")), (5, None)]
    assert kernel.current is None
