"""What happens after an evaluation of a run: it is recorded, and the best model is kept."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lut_ds.engine.launch import Ranks
from lut_ds.tracking import MetricsLog, read_metrics


class Judge(ABC):
    """Evaluates after epochs or steps, records that in evaluations.jsonl, and keeps the best in best/.

    Args:
        ranks, folder: of the run.
        steps_per_epoch: of the training data.
        keys: what is measured, the first being what decides: higher is better.
    """

    def __init__(self, ranks: Ranks, folder: Path, steps_per_epoch: int, keys: tuple[str, ...]) -> None:
        self._ranks, self._folder, self._per_epoch, self._keys = ranks, folder, steps_per_epoch, keys
        self._log = folder / "evaluations.jsonl"

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """Evaluate the model as it is; a collective."""

    @abstractmethod
    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the model with `about` in its config.json under lut_ds; a collective. RunFault when it cannot be written."""

    @abstractmethod
    def describe(self, found: dict[str, Any]) -> str:
        """What was measured, in words."""

    def __call__(self, step: int, say: Callable[[str], None]) -> None:
        """Evaluate after `step` steps; a collective."""
        found = self.measure()
        record = {"step": step, "epoch": step / self._per_epoch, **found}
        best, decides = self.best(), self._keys[0]
        verdict = [best is None or found[decides] > best[decides] or best["step"] == step]
        dist.broadcast_object_list(verdict, src=0)  # rank 0's disk decides
        if verdict[0]:
            self.keep(self._folder / "best", step, found)
        if self._ranks.main:
            log = MetricsLog(self._log, step - 1)  # what is run again is recorded again
            log.write([record])
            log.close()
        note = ", the best so far" if verdict[0] else ""
        say(f"epoch {record['epoch']:.4g}: {self.describe(found)} on val{note}")

    def keep(self, folder: Path, step: int, found: dict[str, Any] | None = None) -> None:
        """Write the model and what it scored; a collective.

        Raises:
            RunFault: it cannot be written.
        """
        self.write(folder, {"step": step, "epoch": step / self._per_epoch, **(found or {})})

    def best(self) -> dict[str, Any] | None:
        """Step, epoch and what was measured of what is in best/, or None."""
        try:
            about = json.loads((self._folder / "best" / "config.json").read_text())["lut_ds"]
            later = {key: about.get(key) for key in self._keys[1:]}  # what an earlier version did not measure
            return {key: about[key] for key in ("step", "epoch", self._keys[0])} | later
        except (OSError, ValueError, KeyError):
            return None

    def results(self) -> dict[str, Any]:
        """For results.json: the last evaluation, and the best."""
        last = (read_metrics(self._log) or [{}])[-1]
        weights = str(self._folder / "best" / "model.safetensors")
        return {**{key: last.get(key) for key in self._keys}, "best": self.best(), "weights": weights}
