"""The mIoU on validation images, the best model, and a picture of what it predicts."""

from pathlib import Path
from typing import Any

from lut_ds.engine.launch import Ranks
from lut_ds.engine.train import on_all
from lut_ds.tracking import read_metrics
from lut_ds.transfer.export import write_timm
from lut_ds.transfer.judge import Judge
from lut_ds.transfer.segmentation.config import SegmentRecipe
from lut_ds.transfer.segmentation.evaluate import Windows, evaluate
from lut_ds.transfer.segmentation.folder import MaskedImages
from lut_ds.transfer.segmentation.pictures import write_predictions
from lut_ds.transfer.segmentation.step import SegmentTrainer


class SegmentJudge(Judge):
    """Evaluates, records that, keeps the best, and draws predictions.png of the last.

    Args:
        recipe, ranks, folder, trainer: of the run.
        val: what it is evaluated on.
        config: what best/config.json says of the model.
        steps_per_epoch: of the training data.
        threads: decoding threads.
    """

    def __init__(
        self,
        recipe: SegmentRecipe,
        ranks: Ranks,
        folder: Path,
        trainer: SegmentTrainer,
        val: MaskedImages,
        config: dict[str, Any],
        steps_per_epoch: int,
        threads: int,
    ) -> None:
        super().__init__(ranks, folder, steps_per_epoch, ("miou", "macc", "aacc"))
        self._recipe, self._trainer, self._val, self._config, self._threads = recipe, trainer, val, config, threads

    def measure(self) -> dict[str, Any]:
        """See Judge."""
        r, student = self._recipe, self._trainer.student
        windows = Windows(r.model.image_size, r.stride, r.data.eval_batch)
        student.eval()
        found, shown = evaluate(
            self._trainer.logits, self._val, r.data.classes, windows, self._ranks, self._threads, r.data.pictures
        )
        student.train()
        if self._ranks.main and shown:
            write_predictions(self._folder / "predictions.png", self._val, shown)
        return found

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """See Judge; `load_segmenter` reads it."""
        weights = self._trainer.weights()
        config = {"segmenter": self._config, "lut_ds": {**about, "recipe": self._recipe.model_dump(mode="json")}}
        on_all(lambda: write_timm(folder, config, weights) if self._ranks.main else None)

    def results(self) -> dict[str, Any]:
        """See Judge; with the IoU of every class."""
        last = (read_metrics(self._log) or [{}])[-1]
        return {**super().results(), "classes": dict(zip(self._config["classes"], last.get("iou", [])))}

    def describe(self, found: dict[str, Any]) -> str:
        """See Judge."""
        return f"mIoU {found['miou']:.2f} %, mAcc {found['macc']:.2f} %, aAcc {found['aacc']:.2f} %"
