"""Processes side by side, each with its share of the machine; one that fails is remembered, and the others go on."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lut_ds.engine.signals import STOP_SIGNALS, StopRequest

_POLL = 0.5  # seconds between looks at the stop request


@dataclass(frozen=True)
class Job:
    """A process to run: `function(*arguments, log, environment)`, which ends with an exit code.

    It starts with the signals of STOP_SIGNALS blocked, so that none ends it, or the process it is forked from, half imported;
    the function unblocks them.

    Attributes:
        title: for people; cost: its expected time, in any unit.
        stop_signal: what asks it to stop.
    """

    title: str
    cost: float
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    log: Path
    stop_signal: signal.Signals = signal.SIGTERM


@dataclass(frozen=True)
class Ended:
    """A job whose process is over: its exit code (negative: the signal that killed it), and seconds."""

    job: Job
    code: int
    seconds: float


@dataclass(frozen=True)
class _Working:
    """A job at work, in one of the places that are filled side by side."""

    job: Job
    place: int
    began: float


def run_jobs(
    jobs: Sequence[Job],
    side_by_side: int,
    threads: int,
    stop: StopRequest,
    report: Callable[[Ended], None],
    devices: Sequence[str],
) -> list[Ended]:
    """Run all jobs, `side_by_side` at a time; after a stop request no more are started, and those at work are asked to save.

    Args:
        jobs: in the order in which they start.
        threads: of each process's arithmetic; OMP_NUM_THREADS in the environment takes precedence.
        stop: asked while waiting. What interrupts this process all the same ends its jobs too.
        report: called after each job.
        devices: the GPUs, of which a job sees one: that of its place, in turn; none trains on the CPU.

    Returns:
        What ended, in that order.
    """
    waiting, places, asked = list(jobs), list(range(side_by_side)), False
    working: dict[BaseProcess, _Working] = {}
    ended: list[Ended] = []
    with _environment({"OMP_NUM_THREADS": str(threads)}), _ended_with_us(working):
        context = _context(bool(devices))
        resource_tracker.ensure_running()  # started by the first process else, and that would unblock its signals
        while working or (waiting and not stop.requested):
            while waiting and places and not stop.requested:
                job, place = waiting.pop(0), places.pop(0)
                own = {"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} if devices else {}
                process = context.Process(target=job.function, args=(*job.arguments, job.log, own), name=job.title)
                # Before it imports: DeepSpeed's import asks CUDA, which reads the variable once.
                with _set(own), _blocked():
                    process.start()
                working[process] = _Working(job, place, time.monotonic())
            connection.wait([process.sentinel for process in working], timeout=_POLL)
            if stop.requested and not asked:
                asked = True
                _tell(working)
            for process in [p for p in working if not p.is_alive()]:
                was = working.pop(process)
                places.append(was.place)
                process.join()
                ended.append(Ended(was.job, int(process.exitcode or 0), time.monotonic() - was.began))
                report(ended[-1])
    return ended


def visible_devices() -> list[str]:
    """The GPUs to share out, by the names that CUDA_VISIBLE_DEVICES has for them; none where training goes to the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return []
    return device_names(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())


def device_names(variable: str | None, count: int) -> list[str]:
    """The names in a value of CUDA_VISIBLE_DEVICES, of which CUDA finds `count`; None is no value.

    CUDA reads up to the first name that is no device. Of the parts of partitioned GPUs (MIG) it gives a process only the first,
    and each process may have another.
    """
    names = [str(i) for i in range(count)] if variable is None else [name.strip() for name in variable.split(",")]
    return [name for name in names if name] if names[:1] and names[0].startswith("MIG") else names[:count]


def _context(gpu: bool) -> Any:
    """How processes start: forked from one that has imported everything; with a GPU afresh, for CUDA does not survive a fork."""
    if gpu:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lut_ds.sweep.worker"])
    return context


def _tell(working: Mapping[BaseProcess, _Working]) -> None:
    """Ask all to save and stop."""
    for process, was in working.items():
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, was.job.stop_signal)


@contextmanager
def _ended_with_us(working: Mapping[BaseProcess, _Working]) -> Iterator[None]:
    """Leave no process behind: a fault here lets them save, a second Ctrl-C does not."""
    try:
        yield
    except KeyboardInterrupt:
        for process in working:
            process.kill()
        raise
    finally:
        _tell(working)
        for process in working:
            process.join()


@contextmanager
def _blocked() -> Iterator[None]:
    """Hold back the signals that ask to stop: they come afterwards. A process that is started inside begins so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[name] for name in STOP_SIGNALS])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    with _set({key: value for key, value in defaults.items() if key not in os.environ}):
        yield
