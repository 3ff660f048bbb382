"""What one process of a sweep does: a run, trained by the engine and evaluated, or raw pixels; with a log of its own."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import deepspeed  # noqa: F401 - slow to import: workers are forked from a process that has it

from lut_ds.config import Recipe
from lut_ds.engine.sweepfile import Entry
from lut_ds.engine.train import pretrain
from lut_ds.errors import RunFault, UserError
from lut_ds.sweep.measure import record_pixels, record_run

DONE, FAULT, BAD_INPUT, STOPPED = 0, 1, 2, 3  # exit codes, as the commands'


def work_run(entry: Entry, evaluate: Sequence[str], threads: int, log: Path, environment: Mapping[str, str]) -> None:
    """Train, or continue, a run, then evaluate it; ends the process with an exit code as `lut-ds pretrain` has them."""

    def run() -> int:
        recipe = with_threads(entry.recipe, threads)
        outcome = pretrain(recipe, entry.words[0])
        if outcome.stopped_by is not None:
            print(f"stopped by {outcome.stopped_by} at step {outcome.step} of {outcome.steps}", file=sys.stderr)
            return STOPPED
        record_run(entry, evaluate, threads)
        return DONE

    _finish(run, log, environment)


def work_pixels(recipe: Recipe, path: Path, threads: int, log: Path, environment: Mapping[str, str]) -> None:
    """Evaluate raw pixels; ends the process with an exit code."""

    def run() -> int:
        record_pixels(recipe, path, threads)
        return DONE

    _finish(run, log, environment)


def with_threads(recipe: Recipe, threads: int) -> Recipe:
    """The recipe with this process's share of the machine, where it leaves that open."""
    if recipe.data.threads is not None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"threads": threads})})


def _finish(run: Callable[[], int], log: Path, environment: Mapping[str, str]) -> None:
    """Everything that is printed goes to the log, what went wrong as its last line."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    try:
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
