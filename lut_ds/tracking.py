"""Watching a run: metrics.jsonl is the truth, a progress bar for people, Weights & Biases as a mirror that cannot hurt."""

import contextlib
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm


class MetricsLog:
    """metrics.jsonl: one JSON object a step, appended in order.

    Args:
        path: the file; records after `resume_step` and a torn last line are dropped, as those steps are run again.

    Attributes:
        last: step of the last record that was kept, or 0; below `resume_step` only if something else damaged the file.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= resume_step]
        self.last: int = kept[-1]["step"] if kept else 0
        aside = path.with_name(f".{path.name}.partial")  # what a killed process left is taken over by the next
        with aside.open("w") as file:
            file.writelines(_line(record) for record in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        self._file = path.open("a")

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records and hand them to the operating system."""
        self._file.write("".join(map(_line, records)))
        self._file.flush()

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Wait until everything is on the disk, and close the file."""
        self.sync()
        self._file.close()


class EventLog:
    """events.jsonl: what happened to a run besides its steps, one JSON object a line, over all its starts.

    Args:
        path: the file; a line that a crash cut short is ended, so that the next one is whole.
    """

    def __init__(self, path: Path) -> None:
        torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a")
        if torn:
            self._file.write("\n")

    def write(self, event: str, **fields: Any) -> None:
        """Append an event with the time of day, and hand it to the operating system."""
        self._file.write(_line({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Events of an events.jsonl; lines cut short by a crash are left out. Empty if there is no file."""
    events = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict) and "event" in event]


def _line(record: Mapping[str, Any]) -> str:
    return (
        json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}) + "\n"
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a line cut short by a crash ends the list. Empty if there is no file."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            break
        records.append(record)
    return records


class Progress:
    """One line with steps, images/s, ETA and a few metrics: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(
        self,
        total: int,
        done: int,
        images_per_step: int,
        flops_per_image: float,
        peak_flops: float | None,
        title: str = "pretrain",
    ) -> None:
        self._images, self._flops, self._peak = images_per_step, flops_per_image, peak_flops
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=terminal,
            mininterval=0.5 if terminal else 30.0,
            disable=None if terminal else False,
            bar_format="{desc} {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        self._bar.set_description(title)

    def update(self, steps: int, images_per_second: float, shown: Mapping[str, float]) -> None:
        """Advance by `steps` with the current speed and values to show."""
        postfix = {"images/s": f"{images_per_second:.1f}", **{name: f"{value:.4g}" for name, value in shown.items()}}
        if self._peak:
            postfix["MFU"] = f"{100 * self._flops * images_per_second / self._peak:.1f}%"
        self._bar.set_postfix(postfix, refresh=False)
        self._bar.update(steps)

    def back_to(self, step: int) -> None:
        """Show fewer steps: the run was rewound."""
        self._bar.n = step
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._bar.close()


class WandbMirror:
    """Sends metrics to Weights & Biases from a thread of its own; nothing it does reaches the training loop.

    A full queue drops records, a failure ends the mirror with one line on standard error, and closing waits a bounded
    time. The run's id is kept by the caller so that a resumed run continues the same curve.
    """

    def __init__(
        self, mode: str, project: str, run_id: str, name: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=1000)
        self.dropped = 0
        self.failed = False
        options = {
            "mode": mode,
            "project": project,
            "id": run_id,
            "name": name,
            "dir": str(folder),
            "config": dict(config),
            "resume": "allow",
        }
        self._thread = threading.Thread(target=self._serve, args=(options,), daemon=True, name="wandb-mirror")
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Queue a record; never blocks."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout: float = 20.0) -> None:
        """Give the mirror up to `timeout` seconds to finish."""
        deadline = time.monotonic() + timeout
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._queue.put(None, timeout=0.2)
                break
            except queue.Full:
                continue
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            # A service that hangs would hang this process too, when it exits and wandb waits for it.
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.name().startswith("wandb"):
                        child.kill()
            self._thread.join(5.0)

    def _serve(self, options: dict[str, Any]) -> None:
        try:
            import wandb

            run = wandb.init(**options, settings=wandb.Settings(silent=True, console="off", x_disable_stats=False))
            while (record := self._queue.get()) is not None:
                run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
            run.finish()
        except Exception as error:  # noqa: BLE001 - whatever breaks in there must not reach the run; it is said once
            self.failed = True
            print(f"wandb: mirror stopped, the run goes on: {type(error).__name__}: {error}", file=sys.stderr)
            with contextlib.suppress(Exception):  # takes back wandb's exit hook, which would fail again and say so
                sys.modules["wandb"].teardown()
