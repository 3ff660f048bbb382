"""A small run under attack, and how to tell whether it still is the run that nobody disturbed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lut_ds.engine.manifest import read_manifest, step_folders, verify
from lut_ds.tracking import read_events, read_metrics
from tests.engine.launching import GPUS, PATIENCE, ROOT, Process, Rank, free_port
from tests.engine.tiny import tiny_tree

T = TypeVar("T")
VOLATILE = ("images_per_s", "data_wait")  # what depends on the clock
LOG_EVERY, SAVE_EVERY = 2, 4  # metrics have the same form wherever a run was stopped: saves come with writes of metrics
KEEP_LAST = 6


def until(condition: Callable[[], T], what: str, pause: float = 0.02) -> T:
    """Wait for a condition and return what it found; fails naming `what` did not come."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE:g} s"
        time.sleep(pause)
    return found


class Start:
    """One start of a run: its ranks' processes and what they say, which goes to files.

    Args:
        processes: one a rank.
        logs: of standard output and of standard error, each one a rank.
    """

    def __init__(self, processes: list[Process], logs: tuple[list[Path], list[Path]]) -> None:
        self.processes, self._out, self._err = processes, *logs

    def said(self, rank: int = 0) -> str:
        """Standard error of a rank so far."""
        return self._err[rank].read_text(errors="replace")

    def lines(self, rank: int = 0) -> list[str]:
        """What a rank had to say about its end: `lut-ds: ...`, and the first lines of stack traces."""
        return [line for line in self.said(rank).splitlines() if line.startswith(("lut-ds: ", "Traceback"))]

    def result(self) -> dict[str, Any]:
        """Rank 0's result."""
        return json.loads(self._out[0].read_text())

    def alive(self) -> bool:
        """Whether all ranks run."""
        return all(process.poll() is None for process in self.processes)

    def end(self, timeout: float = PATIENCE) -> list[int]:
        """Wait for all ranks; their exit codes. None is left behind."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """End every rank at once."""
        for process in self.processes:
            process.kill()
            process.wait()


class Victim:
    """A run of a few thousand parameters on a folder of images: metrics every 2 steps, a checkpoint every 4.

    Args:
        folder: its own; the run folder is `run` in it.
        data: image folder.
        ranks: world size of every start.
    """

    def __init__(self, folder: Path, data: Path, ranks: int = 1) -> None:
        self.folder, self.run, self.data, self.ranks = folder, folder / "run", data, ranks
        tree = tiny_tree(global_batch=16, epochs=200)
        tree["data"] = {"path": str(data), "threads": 1}
        tree["run"] = {"dir": str(self.run), "log_every": LOG_EVERY, "save_every": SAVE_EVERY}
        tree["run"] |= {"keep_last": KEEP_LAST, "seed": 3}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))

    def start(self, *overrides: str, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Start:
        """Start, or continue, the run.

        Args:
            overrides: of the recipe.
            prefix: words before the command, such as those that enter a namespace.
            env: further variables.
        """
        shared = {**os.environ, "WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_PORT": str(free_port()), **(env or {})}
        words = ["pretrain", str(self.folder / "recipe.yaml"), *overrides, "--json"]
        logs = tuple([self.folder / f"rank{rank}.{kind}" for rank in range(self.ranks)] for kind in ("out", "err"))
        processes: list[Process] = []
        for rank, out, err in zip(range(self.ranks), *logs, strict=True):
            mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with out.open("w") as output, err.open("w") as error:
                if not (GPUS or prefix or env):
                    processes.append(Rank("lut_ds", words, mine, (out, err)))
                    continue
                command = [*prefix, sys.executable, "-m", "lut_ds", *words]
                processes.append(subprocess.Popen(command, cwd=ROOT, env=mine, stdout=output, stderr=error, text=True))
        return Start(processes, logs)

    def go(self, steps: int, *overrides: str, **options: Any) -> Start:
        """Run up to a step, which must end well."""
        start = self.start(f"train.max_steps={steps}", *overrides, **options)
        codes = start.end()
        assert codes == [0] * self.ranks, f"exit {codes}: {start.said()[-2000:]}"
        return start

    def reach(self, start: Start, more: int) -> int:
        """Wait until a start recorded so many more steps than there were, and return the last."""
        wanted = self.last_step() + more

        def reached() -> bool:
            assert start.alive(), f"a rank ended by itself: {start.said()[-2000:]}"
            return self.last_step() >= wanted

        until(reached, f"step {wanted}")
        return wanted

    @property
    def checkpoints(self) -> Path:
        """Where they are."""
        return self.run / "checkpoints"

    def curve(self) -> list[str]:
        """Every recorded step as JSON, without what depends on the clock."""
        records = read_metrics(self.run / "metrics.jsonl")
        return [json.dumps({k: v for k, v in record.items() if k not in VOLATILE}) for record in records]

    def last_step(self) -> int:
        """The last that is recorded, or 0."""
        records = read_metrics(self.run / "metrics.jsonl")
        return records[-1]["step"] if records else 0

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of a kind, over all starts."""
        return [event for event in read_events(self.run / "events.jsonl") if event["event"] == kind]

    def partials(self) -> set[str]:
        """Saves that were begun and not finished."""
        return {path.name for path in self.checkpoints.glob(".step_*.partial")}

    def damaged(self) -> list[str]:
        """Finished checkpoints that are not what their manifest says."""
        return [f"{path.name}: {wrong}" for path in step_folders(self.checkpoints) if (wrong := verify(path))]

    def leftovers(self) -> list[str]:
        """What an ended run has no business to leave: temporary files and folders, heartbeats, stacks."""
        hidden = [p for folder in (self.run, self.checkpoints) for p in folder.glob(".*") if p.name != ".lock"]
        return sorted(p.name for p in [*hidden, *self.run.glob("heartbeats"), *self.run.glob("stacks")])

    def deviation(self, undisturbed: "Victim") -> str | None:
        """The first difference from the undisturbed run, or None: every record, and every checkpoint that both have.

        Raises:
            AssertionError: the undisturbed run is shorter, or they have no checkpoint in common.
        """
        mine, theirs = self.curve(), undisturbed.curve()
        assert len(theirs) >= len(mine)
        for number, (record, expected) in enumerate(zip(mine, theirs, strict=False), 1):
            if record != expected:
                return f"metrics.jsonl, line {number}: {record} instead of {expected}"
        there = {path.name: path for path in step_folders(undisturbed.checkpoints)}
        common = [path for path in step_folders(self.checkpoints) if path.name in there]
        assert common, "no checkpoint to compare"
        for path in common:
            files, expected_files = (read_manifest(p)["files"] for p in (path, there[path.name]))
            for name in files.keys() - {"state.json"}:  # which names the run's folder
                if files[name] != expected_files[name]:
                    return f"{path.name}/{name} differs"
        return None


def undisturbed(folder: Path, data: Path, ranks: int, steps: int) -> Victim:
    """The same run without any fault; it keeps all its checkpoints."""
    victim = Victim(folder, data, ranks)
    victim.go(steps, "run.keep_last=1000000")
    assert victim.last_step() == len(victim.curve()) == steps
    return victim
