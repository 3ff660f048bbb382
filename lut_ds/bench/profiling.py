"""What torch's profiler sees of a training step: a trace to open in a browser, and the time that exchanges between ranks take."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_trace(step: Callable[[], Tensor], file: Path, device: torch.device, main: bool) -> None:
    """Profile two steps, by operator and, on a GPU, by kernel; the main rank writes a Chrome trace (JSON) to `file`."""
    profile = _profiled(step, device, 2)
    if main:
        file.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(file))


def communication_ms(step: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds of a step in which at least one exchange between ranks runs, hidden behind computation or not.

    On a GPU the time of NCCL's kernels, elsewhere from gloo's start of an exchange to its end; both include waiting for
    slower ranks.
    """
    events: Any = _profiled(step, device, 1).events()
    if device.type == "cuda":
        kind = torch.autograd.DeviceType.CUDA
        found = [e.time_range for e in events if e.device_type == kind and e.name.startswith("nccl")]
    else:
        found = [e.time_range for e in events if e.name.startswith("gloo:")]
    return covered((span.start, span.end) for span in found) / 1e3


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans (start, end), which may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _profiled(step: Callable[[], Tensor], device: torch.device, steps: int) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return profile
