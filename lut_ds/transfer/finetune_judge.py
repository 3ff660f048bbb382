"""The accuracy on val after every epoch of fine-tuning, and the best epoch's classifier as a timm checkpoint."""

import json
from pathlib import Path
from typing import Any

from lut_ds.data.sources import Source
from lut_ds.engine.files import write_text_atomically
from lut_ds.engine.launch import Ranks
from lut_ds.engine.train import on_all
from lut_ds.transfer.accuracy import accuracy, by_frequency
from lut_ds.transfer.config import FinetuneRecipe
from lut_ds.transfer.export import classifier_config, write_timm
from lut_ds.transfer.finetune_start import sizes
from lut_ds.transfer.finetune_step import FinetuneTrainer
from lut_ds.transfer.judge import Judge


class FinetuneJudge(Judge):
    """Evaluates after epochs, records that, and keeps the best.

    Args:
        recipe, ranks, folder, trainer: of the run.
        val: what it is evaluated on.
        train_images: of each class in the training set.
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
        train_images: list[int],
        steps_per_epoch: int,
        threads: int,
    ) -> None:
        super().__init__(ranks, folder, steps_per_epoch, ("top1", "top5", "mean_class", "many", "medium", "few"))
        self._recipe, self._trainer, self._val, self._threads = recipe, trainer, val, threads
        self._train_images = train_images

    def measure(self) -> dict[str, Any]:
        """See Judge."""
        r = self._recipe
        found = accuracy(
            self._trainer.evaluated, self._val, r.model.image_size, self._ranks, r.data.eval_batch, self._threads
        )
        per_class = found.pop("per_class")
        if self._ranks.main:
            table = {
                name: {"accuracy": value, "train_images": count}
                for name, value, count in zip(self._val.classes, per_class, self._train_images, strict=True)
            }
            write_text_atomically(self._folder / "per_class.json", json.dumps(table, indent=1) + "\n")
        return found | by_frequency(per_class, self._train_images)

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """See Judge; a timm checkpoint."""
        weights, m = self._trainer.weights(), self._recipe.model
        about["recipe"] = self._recipe.model_dump(mode="json")
        config = classifier_config(sizes(self._recipe), m.pool, self._val.classes, about)
        on_all(lambda: write_timm(folder, config, weights) if self._ranks.main else None)

    def describe(self, found: dict[str, Any]) -> str:
        """See Judge."""
        groups = {name: found[name] for name in ("many", "medium", "few") if found[name] is not None}
        tail = "".join(f", {name} {value:.2f} %" for name, value in groups.items()) if len(groups) > 1 else ""
        return f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, mean of classes {found['mean_class']:.2f} %{tail}"
