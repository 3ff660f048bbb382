"""How each rank is doing: its own computing time, its waits for data, its memory; and what is unusual about them."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist

LEAST_SHARE = 0.1  # of a step: who computes longer by less hardly delays the others


class Vitals(NamedTuple):
    """One rank's state since the last flush, means over its steps."""

    compute: float
    """Seconds a step of work that waits for no other rank (the teacher's forward pass; for MAE the student's)."""
    data: float
    """Seconds a step that the loop waited for data."""
    memory: float
    """Bytes: allocated by tensors on the GPU, or resident in the process on a CPU."""


class LocalClock:
    """Time inside `with clock:`, measured on the device itself, so that no step waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def __enter__(self) -> None:
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._spans.append((begin, end))
        else:
            self._began = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        if self._cuda:
            self._spans[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Seconds since the last call; on a GPU call it when the device is done with them."""
        total = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        self._seconds = 0.0
        self._spans.clear()
        return total


def memory_in_use(device: torch.device) -> float:
    """Bytes, as `Vitals.memory`."""
    return float(torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss)


def exchange(own: Vitals, device: torch.device) -> list[Vitals]:
    """Every rank's vitals, by rank; a small collective that waits for the device."""
    gathered = torch.empty(dist.get_world_size() * len(own), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(gathered, torch.tensor(own, dtype=torch.float64, device=device))
    return [Vitals(*row) for row in gathered.view(-1, len(own)).tolist()]


@dataclass(frozen=True)
class Straggler:
    """A rank that keeps the others waiting: `seconds` a step of `cause` against the ranks' median."""

    rank: int
    cause: str
    seconds: float
    median: float


class StragglerWatch:
    """Finds ranks that are slow for several flushes in a row; each is named once, and again if it had recovered.

    Args:
        factor: slow is a computing time above factor x the ranks' median, or a wait for data that is longer than the median
            one by (factor - 1) x a whole step.
        flushes: how many in a row.
    """

    def __init__(self, factor: float, flushes: int = 3) -> None:
        self._factor, self._flushes = factor, flushes
        self._slow: dict[tuple[int, str], int] = {}

    def feed(self, vitals: Sequence[Vitals], step_seconds: float) -> list[Straggler]:
        """Take in one flush; returns who has become a straggler with it."""
        found = []
        for cause, values in {
            "computing": [v.compute for v in vitals],
            "waiting for data": [v.data for v in vitals],
        }.items():
            median = statistics.median_low(values)
            excess = {
                "computing": max((self._factor - 1) * median, LEAST_SHARE * step_seconds),
                "waiting for data": (self._factor - 1) * step_seconds,
            }[cause]
            for rank, value in enumerate(values):
                key = rank, cause
                self._slow[key] = self._slow.get(key, 0) + 1 if value - median > excess else 0
                if self._slow[key] == self._flushes:
                    found.append(Straggler(rank, cause, value, median))
        return found


class GrowthWatch:
    """Finds memory that grows steadily: the least value of each block of flushes above that of the block before.

    Blocks even out what a flush happens to catch, and the first one is left out: caches and pools fill then.

    Args:
        limit: growth over `blocks` blocks that is said, as a share of the first of them.
        blocks, flushes: blocks in a row, and flushes a block.
    """

    def __init__(self, limit: float, blocks: int = 4, flushes: int = 5) -> None:
        self._limit, self._blocks, self._flushes = limit, blocks, flushes
        self._warm = False
        self._current: list[tuple[int, float]] = []
        self._least: list[tuple[int, float]] = []  # (step, bytes) of each block

    def feed(self, step: int, memory: float) -> tuple[int, float, float] | None:
        """Take in one flush; returns (steps, bytes before, bytes now) when steady growth passes the limit."""
        self._current.append((step, memory))
        if len(self._current) < self._flushes:
            return None
        least, self._current = min(self._current, key=lambda entry: entry[1]), []
        if not self._warm:
            self._warm = True
            return None
        if self._least and least[1] <= self._least[-1][1]:
            self._least.clear()
        self._least.append(least)
        (first_step, first), growth = self._least[0], least[1] - self._least[0][1]
        if len(self._least) < self._blocks or growth <= self._limit * first:
            return None
        self._least = [least]  # said once for each such growth
        return least[0] - first_step, first, least[1]
