"""The accuracy on val after every epoch of fine-tuning, and the best epoch's classifier as a timm checkpoint."""

from pathlib import Path
from typing import Any

from lut_ds.data.sources import Source
from lut_ds.engine.launch import Ranks
from lut_ds.engine.train import on_all
from lut_ds.transfer.accuracy import accuracy
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
        super().__init__(ranks, folder, steps_per_epoch, ("top1", "top5"))
        self._recipe, self._trainer, self._val, self._threads = recipe, trainer, val, threads

    def measure(self) -> dict[str, Any]:
        """See Judge."""
        r = self._recipe
        return accuracy(
            self._trainer.evaluated, self._val, r.model.image_size, self._ranks, r.data.eval_batch, self._threads
        )

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """See Judge; a timm checkpoint."""
        weights, m = self._trainer.weights(), self._recipe.model
        about["recipe"] = self._recipe.model_dump(mode="json")
        config = classifier_config(sizes(self._recipe), m.pool, self._val.classes, about)
        on_all(lambda: write_timm(folder, config, weights) if self._ranks.main else None)

    def describe(self, found: dict[str, Any]) -> str:
        """See Judge."""
        return f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %"
