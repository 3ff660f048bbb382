"""What happens after an epoch of fine-tuning: the accuracy on val is recorded, and the best epoch's classifier is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lut_ds.data.sources import Source
from lut_ds.engine.launch import Ranks
from lut_ds.engine.train import on_all
from lut_ds.tracking import MetricsLog, read_metrics
from lut_ds.transfer.accuracy import accuracy
from lut_ds.transfer.config import FinetuneRecipe
from lut_ds.transfer.export import classifier_config, write_timm
from lut_ds.transfer.finetune_start import sizes
from lut_ds.transfer.finetune_step import FinetuneTrainer


class Judge:
    """Evaluates after epochs, records that, and keeps the best.

    Args:
        recipe, ranks, folder, trainer: of the run.
        val: what it is evaluated on.
        steps_per_epoch: of the training data.
        threads: decoding threads.
    """

    def __init__(
        self,
        recipe: FinetuneRecipe,
        ranks: Ranks,
        folder: Path,
        trainer: FinetuneTrainer,
        val: Source,
        steps_per_epoch: int,
        threads: int,
    ) -> None:
        self._recipe, self._ranks, self._folder, self._trainer, self._val = recipe, ranks, folder, trainer, val
        self._per_epoch, self._threads = steps_per_epoch, threads
        self._log = folder / "evaluations.jsonl"

    def __call__(self, step: int, say: Callable[[str], None]) -> None:
        """Evaluate after `step` steps; a collective."""
        found = accuracy(
            self._trainer.evaluated,
            self._val,
            self._recipe.model.image_size,
            self._ranks,
            self._recipe.data.eval_batch,
            self._threads,
        )
        record = {"step": step, "epoch": step / self._per_epoch, **found}
        best = self.best()
        verdict = [best is None or found["top1"] > best["top1"] or best["step"] == step]
        dist.broadcast_object_list(verdict, src=0)  # rank 0's disk decides
        if verdict[0]:
            self.keep(self._folder / "best", step, found)
        if self._ranks.main:
            log = MetricsLog(self._log, step - 1)  # what is run again is recorded again
            log.write([record])
            log.close()
        note = ", the best so far" if verdict[0] else ""
        say(f"epoch {record['epoch']:.4g}: top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} % on val{note}")

    def keep(self, folder: Path, step: int, found: dict[str, float | int] | None = None) -> None:
        """Write the classifier as a timm checkpoint; a collective.

        Raises:
            RunFault: it cannot be written.
        """
        weights, m = self._trainer.weights(), self._recipe.model
        about: dict[str, Any] = {"step": step, "epoch": step / self._per_epoch, **(found or {})}
        about["recipe"] = self._recipe.model_dump(mode="json")
        config = classifier_config(sizes(self._recipe), m.pool, self._val.classes, about)
        on_all(lambda: write_timm(folder, config, weights) if self._ranks.main else None)

    def best(self) -> dict[str, Any] | None:
        """Step, epoch, top1 and top5 of what is in best/, or None."""
        try:
            about = json.loads((self._folder / "best" / "config.json").read_text())["lut_ds"]
            return {key: about[key] for key in ("step", "epoch", "top1", "top5")}
        except (OSError, ValueError, KeyError):
            return None

    def results(self) -> dict[str, Any]:
        """For results.json: the last evaluation, and the best."""
        last = (read_metrics(self._log) or [{}])[-1]
        weights = str(self._folder / "best" / "model.safetensors")
        return {"top1": last.get("top1"), "top5": last.get("top5"), "best": self.best(), "weights": weights}
