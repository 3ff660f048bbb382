"""A run folder as it is read for a report: recipe, metrics, starts, events, results; and what became of the run."""

import contextlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from lut_ds.analysis.curves import run_metrics
from lut_ds.analysis.findings import TITLES, caption, sentence
from lut_ds.analysis.report import TrainingSummary, summarise
from lut_ds.errors import UserError
from lut_ds.tracking import read_events, read_metrics

_SILENT = 600.0  # seconds without a recorded step after which a run on another machine is not taken for going on


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds besides its checkpoints.

    Attributes:
        name: what the page calls it.
        recipe: the resolved recipe's tree, of whatever kind.
        metrics: one record a step, at least one.
        starts: environment.jsonl.
        events: events.jsonl.
        scores: evaluations.jsonl, of runs that are evaluated as they go.
        results: results.json, empty where there is none.
        evaluations: results.json of each folder of `evaluations/`, by the folder's name.
        unreadable: files that are there and hold no JSON object.
    """

    name: str
    path: Path
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    events: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    results: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    unreadable: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What it is, in words."""
        if "method" in self.recipe:
            return f"{str(self.recipe['method'].get('name', '')).upper()} pre-training".strip()
        if "stride" in self.recipe.get("data", {}):
            return "Segmentation training"
        return "Fine-tuning" if "augment" in self.recipe else "Training"

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.metrics[-1]["step"])

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return float(self.metrics[-1]["epoch"])

    @property
    def steps(self) -> int:
        """Steps asked for."""
        train = self.recipe.get("train", {})
        if "iterations" in train:
            whole = int(train["iterations"])
        else:
            whole = round(train.get("epochs", self.epoch) * self.step / self.epoch) if self.epoch else self.step
        return min(whole, train.get("max_steps") or whole)

    @property
    def summary(self) -> TrainingSummary:
        """The metrics in numbers."""
        return summarise(self.metrics, int(self.recipe.get("train", {}).get("global_batch", 0)))

    @property
    def last_written(self) -> str:
        """When the newest metrics reached the file, local time."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime((self.path / "metrics.jsonl").stat().st_mtime))


def read_runs(paths: Sequence[str]) -> list[RunRecord]:
    """Read run folders.

    Raises:
        UserError: a folder without metrics or without a readable recipe.
    """
    return [_read(name, Path(path)) for name, path in zip(short_names(paths), paths, strict=True)]


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart; equal paths are numbered."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({k})" for k, name in enumerate(names, 1)]


def _read(name: str, path: Path) -> RunRecord:
    metrics = run_metrics(path)
    unreadable: list[str] = []

    def read(file: Path) -> dict[str, Any]:
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            unreadable.append(str(file.relative_to(path)))
            return {}
        return found

    root = path / "results.json"
    evaluations = {file.parent.name: read(file) for file in sorted(path.glob("evaluations/*/results.json"))}
    return RunRecord(
        name,
        path,
        _recipe(path / "recipe.yaml"),
        metrics,
        _lines(path / "environment.jsonl"),
        read_events(path / "events.jsonl"),
        read_metrics(path / "evaluations.jsonl"),
        read(root) if root.is_file() else {},
        {folder: found for folder, found in evaluations.items() if found},
        tuple(unreadable),
    )


def _recipe(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "no readable YAML"
        raise UserError(f"run: {file}: expected the recipe of the run, found {reason}; name a run folder") from None
    if not isinstance(tree, dict):
        raise UserError(f"run: {file}: expected a mapping of sections, found {type(tree).__name__}; name a run folder")
    return {section: values for section, values in tree.items() if isinstance(values, dict)}


def _lines(file: Path) -> list[dict[str, Any]]:
    """JSON objects of a file, a line each; a line that a crash cut short is left out."""
    found = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]


@dataclass(frozen=True)
class StoredAnalysis:
    """What `lut-ds analyze` left of one analysis: its `record` (JSON), its picture for `light` and `dark` pages (PNG), and words."""

    name: str
    record: dict[str, Any]
    light: bytes
    dark: bytes
    caption: str
    sentences: dict[str, str]
    """By model."""


def stored_analyses(run: RunRecord) -> list[StoredAnalysis]:
    """The analyses in the run's `evaluations/analysis*`; one of which a file is missing or damaged, or of another version, is left out."""
    found = []
    for file in sorted(run.path.glob("evaluations/analysis*/*.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, StopIteration):
            record = json.loads(file.read_text())
            name, numbers = record["analysis"], record["found"]
            light, dark = (file.with_name(f"{file.stem}{end}.png").read_bytes() for end in ("", "-dark"))
            words = {who: sentence(name, values) for who, values in numbers.items()}
            if name in TITLES and record["models"] and light[:4] == dark[:4] == b"\x89PNG":
                found.append(StoredAnalysis(name, record, light, dark, caption(name, numbers), words))
    return found


@dataclass(frozen=True)
class Status:
    """What became of a run: `state` is done, running, stopped or broken off; `text` says it in a sentence."""

    state: str
    text: str

    @property
    def sentence(self) -> str:
        """The text as a sentence of its own."""
        return f"{self.text[:1].upper()}{self.text[1:]}."


def status(run: RunRecord) -> Status:
    """What became of a run, from its lock, its last step and its last event."""
    done = f"{run.step:,} of {run.steps:,} steps"
    if (owner := _owner(run)) is not None:
        return Status("running", f"going on ({owner}): {done}")
    if run.step >= run.steps:
        return Status("done", f"done: {done}")
    last = next((event for event in reversed(run.events) if event["event"] in ("stopped", "resumed")), None)
    if last is not None and last["event"] == "stopped" and last.get("step", 0) >= run.step:
        return Status("stopped", f"stopped by {last.get('by', 'a signal')}: {done}; the same command continues")
    saved = sorted(p.name for p in (run.path / "checkpoints").glob("step_*"))
    rest = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was saved"
    return Status("broken off", f"broken off (killed, or its machine was lost): {done}; {rest}")


def _owner(run: RunRecord) -> str | None:
    """The process that trains the run now, None where there is none."""
    lock = run.path / ".lock"
    if not lock.is_file():
        return None
    words = lock.read_text(errors="replace").split()  # process PID on HOST
    if len(words) != 4 or not words[1].isdigit():
        return None
    owner = " ".join(words)
    if words[3] != platform.node():
        return owner if time.time() - (run.path / "metrics.jsonl").stat().st_mtime < _SILENT else None
    try:
        # A process that began after the lock was taken has its number by chance.
        return owner if psutil.Process(int(words[1])).create_time() <= lock.stat().st_mtime + 1 else None
    except psutil.Error:
        return None
