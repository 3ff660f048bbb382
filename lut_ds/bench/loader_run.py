"""One loader, measured in a process of its own: `python -m lut_ds.bench.loader_run` reads a task and prints a result."""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from lut_ds.bench.contenders import CONTENDERS
from lut_ds.config import parse_recipe
from lut_ds.data.tuning import Loading
from lut_ds.engine.reading import loading


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        contender: a key of `CONTENDERS`.
        recipe: the recipe as JSON values; its data.path is read.
        batch_size, workers: images a batch; threads or processes that prepare them.
        batches, warmup: batches that count, and batches before them that do not.
        prefetch, hw_decoder_load, preallocate_side: of ours; None takes what a run would.
        step_ms: time the consumer spends on each batch, as a training step would.
        device: `cpu` or `cuda`.
        work: folder for files that a contender needs.
    """

    contender: str
    recipe: dict[str, Any]
    batch_size: int
    workers: int
    batches: int
    warmup: int
    step_ms: float
    device: str
    work: str
    prefetch: int | None = None
    hw_decoder_load: float | None = None
    preallocate_side: int | None = None


def measure(task: Task) -> dict[str, float]:
    """Draw the batches.

    Returns:
        `images_per_s`; `cpu_ms` an image, over this process and its children; `p50_ms` and `p99_ms` of the wait for a
        batch; `stall`, the share of the time spent waiting; `rss_mib`, the largest memory seen, children included.
    """
    recipe, device = parse_recipe(task.recipe, "benchmark"), torch.device(task.device)
    torch.set_num_threads(1)
    how = task_loading(task, loading(recipe, device))
    batches = CONTENDERS[task.contender](recipe, task.batch_size, how, device, Path(task.work))
    for _ in range(task.warmup):
        next(batches)
    cpu, began = _cpu_seconds(), time.perf_counter()
    waits, memory = [], 0.0
    for _ in range(task.batches):
        waits.append(_wait(batches, device))
        memory = max(memory, _rss())
        if task.step_ms:
            time.sleep(task.step_ms / 1e3)
    seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
    images = task.batches * task.batch_size
    return {
        "images_per_s": images / seconds,
        "cpu_ms": cpu / images * 1e3,
        "p50_ms": float(np.percentile(waits, 50)) * 1e3,
        "p99_ms": float(np.percentile(waits, 99)) * 1e3,
        "stall": sum(waits) / seconds,
        "rss_mib": memory / 2**20,
    }


def task_loading(task: Task, usual: Loading) -> Loading:
    """How this task loads: as it says, and as a run would where it says nothing."""
    given: dict[str, Any] = {"hw_decoder_load": task.hw_decoder_load, "preallocate_side": task.preallocate_side}
    decoder = replace(usual.gpu_decoder, **{key: value for key, value in given.items() if value is not None})
    return Loading(task.workers, usual.prefetch if task.prefetch is None else task.prefetch, decoder)


def _wait(batches: Iterator[Any], device: torch.device) -> float:
    """Seconds until the next batch is there, on its device."""
    before = time.perf_counter()
    next(batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - before


def _family() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _cpu_seconds() -> float:
    """CPU time of this process and its living children."""
    return sum(t.user + t.system for t in (process.cpu_times() for process in _family()))


def _rss() -> float:
    """Bytes of memory of this process and its children; pages that they share count once for each."""
    return float(sum(process.memory_info().rss for process in _family()))


def main() -> None:
    """Read a task from standard input, measure, print the result as the last line of standard output."""
    task = Task(**json.load(sys.stdin))
    print(json.dumps(measure(task)), flush=True)
    os._exit(0)  # endless loaders: nothing is left to tidy up, and a DataLoader's workers would be waited for


if __name__ == "__main__":
    main()
