"""Measuring several things fairly: each in a process of its own, all once a round, in rotation, ratios within rounds."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, TypeVar

from tqdm import tqdm

from lut_ds.errors import RunFault

Figures = dict[str, float]
Task = TypeVar("Task")
_SECONDS = 1800  # until a process that hangs is given up


def run_rounds(
    tasks: Mapping[str, Task], rounds: int, run: Callable[[Task], Figures], title: str
) -> list[dict[str, Figures]]:
    """Every task once a round, in rotation, so that what else the machine does falls on all alike.

    Returns:
        For each round, the figures by task name.
    """
    order = list(tasks)
    results = []
    with tqdm(total=rounds * len(order), unit="run", desc=title, file=sys.stderr) as bar:
        for number in range(rounds):
            found = {}
            for name in order[number % len(order) :] + order[: number % len(order)]:
                bar.set_postfix_str(name)
                found[name] = run(tasks[name])
                bar.update()
            results.append(found)
    return results


def run_apart(module: str, task: Any, name: str) -> Figures:
    """Run `python -m module` with the dataclass `task` as JSON on its standard input; its last line is the result.

    Raises:
        RunFault: it failed, or took longer than half an hour; its last line on standard error is repeated.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(asdict(task)),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RunFault(f"bench: {name} did not finish within {_SECONDS} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFault(f"bench: {name} failed (exit code {done.returncode}): {last}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summarise(results: Sequence[Figures]) -> dict[str, Figures]:
    """Median, least and largest of each figure over the rounds."""
    return {
        key: {"median": median(values), "min": min(values), "max": max(values)}
        for key in results[0]
        for values in [[result[key] for result in results]]
    }


def compare(rounds: Sequence[dict[str, Figures]], ours: str, keys: Sequence[str]) -> dict[str, dict[str, Figures]]:
    """`ours` over each other task in the figures `keys`, within rounds."""
    others = [name for name in rounds[0] if name != ours] if ours in rounds[0] else []
    return {
        name: summarise([{key: found[ours][key] / found[name][key] for key in keys} for found in rounds])
        for name in others
    }
