"""Processes side by side, each with its share of the machine; one that fails is remembered, and the others go on."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lut_ds.engine.signals import StopRequest

_POLL = 0.5  # seconds between looks at the stop request


@dataclass(frozen=True)
class Job:
    """A process to run: `function(*arguments, log, environment)`, which ends with an exit code.

    Attributes:
        title: for people; cost: its expected time, in any unit.
    """

    title: str
    cost: float
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    log: Path


@dataclass(frozen=True)
class Ended:
    """A job whose process is over: its exit code (negative: the signal that killed it), and seconds."""

    job: Job
    code: int
    seconds: float


def run_jobs(
    jobs: Sequence[Job], side_by_side: int, threads: int, stop: StopRequest, report: Callable[[Ended], None]
) -> list[Ended]:
    """Run all jobs, `side_by_side` at a time; after a stop request no more are started, and those at work are asked to save.

    Args:
        jobs: in the order in which they start.
        threads: of each process's arithmetic; OMP_NUM_THREADS in the environment takes precedence.
        stop: asked while waiting.
        report: called after each job.

    Returns:
        What ended, in that order.
    """
    with _environment({"OMP_NUM_THREADS": str(threads)}):
        devices = _devices()
        context = _context(bool(devices))
        waiting, slots, asked = list(jobs), list(range(side_by_side)), False
        working: dict[BaseProcess, tuple[Job, int, float]] = {}
        ended: list[Ended] = []
        while working or (waiting and not stop.requested):
            while waiting and slots and not stop.requested:
                job, slot = waiting.pop(0), slots.pop(0)
                own = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
                process = context.Process(target=job.function, args=(*job.arguments, job.log, own), name=job.title)
                with _set(own):  # before it imports: DeepSpeed's import asks CUDA, which reads its variables once
                    process.start()
                working[process] = (job, slot, time.monotonic())
            connection.wait([process.sentinel for process in working], timeout=_POLL)
            if stop.requested and not asked:
                asked = True
                for process in working:
                    process.terminate()  # SIGTERM: a run saves and stops
            for process in [p for p in working if not p.is_alive()]:
                job, slot, began = working.pop(process)
                slots.append(slot)
                process.join()
                ended.append(Ended(job, int(process.exitcode or 0), time.monotonic() - began))
                report(ended[-1])
    return ended


def _context(gpu: bool) -> Any:
    """How processes start: forked from one that has imported everything; with a GPU afresh, for CUDA does not survive a fork."""
    if gpu:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lut_ds.sweep.worker"])
    return context


def _devices() -> list[str]:
    """GPUs by the names that CUDA_VISIBLE_DEVICES has for them; none where training goes to the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def _set(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that a child starts with."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Variables that children inherit unless the user set them; taken away afterwards."""
    new = {key: value for key, value in defaults.items() if key not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for key in new:
            del os.environ[key]
