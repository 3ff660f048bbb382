"""What one process of a sweep does: a run, trained by the engine and evaluated, or raw pixels; with a log of its own."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - slow to import: workers are forked from a process that has it

from lut_ds.config import Recipe
from lut_ds.engine.signals import STOP_SIGNALS, listened
from lut_ds.engine.sweepfile import Entry
from lut_ds.engine.sweepstate import complete
from lut_ds.engine.train import pretrain
from lut_ds.errors import RunFault, UserError
from lut_ds.sweep.measure import record_pixels, record_run
from lut_ds.transfer.load import find_checkpoint

DONE, FAULT, BAD_INPUT, STOPPED, OUT_OF_TIME = 0, 1, 2, 3, 4  # exit codes: the commands', and one more
# Of whoever started the sweep: a run is a process of its own, on a port of its own.
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")


def work_run(
    entry: Entry,
    data: Mapping[str, Any],
    evaluate: Sequence[str],
    threads: int,
    log: Path,
    environment: Mapping[str, str],
) -> None:
    """Train, or continue, a run, then evaluate it; ends the process with an exit code as `lut-ds pretrain` has them.

    Args:
        data: what its images are, for the record.
    """

    def run() -> int:
        if not _trained(entry):
            outcome = pretrain(with_threads(entry.recipe, threads), entry.words[0])
            if outcome.stopped_by is not None:
                print(f"stopped by {outcome.stopped_by} at step {outcome.step} of {outcome.steps}", file=sys.stderr)
                return OUT_OF_TIME if outcome.stopped_by == "time limit" else STOPPED
        record_run(entry, data, evaluate, threads)
        return DONE

    _finish(run, log, environment, listened(entry.recipe.run.stop_signals))


def work_pixels(
    recipe: Recipe, data: Mapping[str, Any], path: Path, threads: int, log: Path, environment: Mapping[str, str]
) -> None:
    """Evaluate raw pixels; ends the process with an exit code."""

    def run() -> int:
        record_pixels(recipe, data, path, threads)
        return DONE

    _finish(run, log, environment, signal.SIGTERM)


def with_threads(recipe: Recipe, threads: int) -> Recipe:
    """The recipe with this process's share of the machine, where it leaves that open."""
    if recipe.data.threads is not None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"threads": threads})})


def _trained(entry: Entry) -> bool:
    """Whether only the evaluation is left: a job array trained it, perhaps where there are GPUs and none here."""
    try:
        checkpoint = find_checkpoint(entry.folder)
    except UserError:  # none that is whole
        return False
    return complete(entry.recipe, checkpoint.step, checkpoint.epoch)


def _finish(run: Callable[[], int], log: Path, environment: Mapping[str, str], stop_signal: signal.Signals) -> None:
    """Everything that is printed goes to the log, what went wrong as its last line."""
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        _take_place(environment, stop_signal)
        code = run()
    except (UserError, RunFault) as error:
        code = BAD_INPUT if isinstance(error, UserError) else FAULT
        print(f"lut-ds: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = STOPPED
        print("lut-ds: interrupted", file=sys.stderr)
    except BaseException:  # noqa: BLE001 - whatever it was, it is in the log, and the sweep goes on
        code = FAULT
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    sys.exit(code)


def _take_place(environment: Mapping[str, str], stop_signal: signal.Signals) -> None:
    """Environment and signals of a run: what asks it to stop comes from the sweep, or from the sweep's end.

    Ctrl-C reaches every process of a terminal. It is the sweep's to pass on; a run that listens to it itself may.
    """
    for name in _LAUNCHERS:
        os.environ.pop(name, None)
    os.environ.update(environment)
    if stop_signal is not signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.Signals[name] for name in STOP_SIGNALS])
    parent = multiprocessing.parent_process()

    def follow() -> None:
        assert parent is not None
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), stop_signal)

    if parent is not None:
        threading.Thread(target=follow, daemon=True).start()
