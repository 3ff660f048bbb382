"""The demo: pre-train a small LUT on handwritten digits through the real engine, then show what it learned."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lut_ds.analysis.curves import run_metrics, write_curves
from lut_ds.analysis.demo_page import NAMES, draw_knn, write_demo_page
from lut_ds.analysis.figures import Draw, png, write_aside
from lut_ds.analysis.reconstruct import draw_reconstruction, fixed_noise, reconstruct
from lut_ds.analysis.report import summarise
from lut_ds.config import Recipe, load_recipe
from lut_ds.data.digits import write_digits
from lut_ds.data.loader import EvalLoader
from lut_ds.data.sources import Source, open_source
from lut_ds.engine.build import build_student
from lut_ds.engine.runfolder import open_run_folder, run_folder
from lut_ds.engine.train import pretrain
from lut_ds.errors import UserError
from lut_ds.transfer.knn import Features, encoder_features, knn_top1, pixel_features
from lut_ds.transfer.load import Checkpoint, all_checkpoints, load_encoder, load_student

KS, K, TEMPERATURE = (5, 10, 20), 10, 0.07  # K is the one shown first
SAMPLES = 10  # reconstructions
FILES = {
    "report": "report.html",
    "reconstruction": "reconstruction.png",
    "curves": "curves.png",
    "knn": "knn.png",
    "results": "results.json",
}


@dataclass(frozen=True)
class LabelledImages:
    """Decoded images uint8 [N, S, S, 3] with int64 labels [N]; small sets only."""

    pixels: Tensor
    labels: Tensor


def run_demo(overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Write the digits, pre-train (or continue), evaluate, and write the report.

    A demo that was interrupted is continued; a finished one is evaluated and reported again.

    Args:
        overrides: `section.key=value` over the demo recipe.

    Returns:
        What results.json holds, and the same for people. `stopped_by` names the signal that ended the training early.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("demo: expected one process, found WORLD_SIZE above 1; start it without a launcher")
    recipe = load_recipe("demo", overrides)
    if recipe.method.degradation != "none":
        raise UserError(
            f"method.degradation: expected none, for the demo pictures masks only, found {recipe.method.degradation!r}; see it with "
            "`lut-ds data show demo`, train it with `lut-ds pretrain demo`, both with data.path=DIR (`lut-ds data shapes DIR` makes one)"
        )
    recipe, folder, subject = _prepare(recipe)
    train, val = (open_source(str(recipe.data.path), split) for split in ("train", "val"))
    if not train.classes or train.classes != val.classes:
        raise UserError(
            f"data.path: {recipe.data.path}: the demo's k-NN needs the same class folders in train and val, found "
            f"{train.classes[:3]}... and {val.classes[:3]}...; check both folders"
        )
    if max(KS) > len(train):
        raise UserError(
            f"data.path: {recipe.data.path}: expected at least {max(KS)} training images, found {len(train)}"
        )
    _say(f"1/4 data: {len(train):,} training and {len(val):,} held-out images in {recipe.data.path}")
    _say(f"2/4 pre-training in {folder}; interrupt at any time, the same command continues")
    outcome = pretrain(recipe, "demo")
    if outcome.stopped_by is not None:
        text = f"stopped by {outcome.stopped_by} at step {outcome.step} of {outcome.steps}; the same command continues"
        return {"stopped_by": outcome.stopped_by, "step": outcome.step, "run": str(folder)}, text
    began = time.monotonic()
    bank, queries = (_read_all(source, recipe.model.image_size, recipe.data.threads or 2) for source in (train, val))
    checkpoints = all_checkpoints(folder)
    knn = evaluate(recipe, checkpoints, bank, queries)
    _say("4/4 pictures and report")
    results = _results(recipe, folder, knn, bank, queries)
    panel = _reconstructions(checkpoints[-1], queries, val.classes)
    _write_outputs(recipe, folder, subject, results, panel)
    _say(f"evaluated and reported in {time.monotonic() - began:.0f} s")
    return results, _summary(results)


def _prepare(recipe: Recipe) -> tuple[Recipe, Path, str]:
    """The recipe with its data folder, the run folder, and what the images are.

    The digits are written into the run folder, unless the user named other data.
    """
    folder = run_folder(recipe, "demo")
    if recipe.data.path is not None:
        return recipe, folder, Path(recipe.data.path).name
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(folder / "data")})})
    if not (folder / "recipe.yaml").is_file():
        open_run_folder(folder, recipe).close()  # a folder that holds data alone would not pass for a run
    write_digits(folder / "data", recipe.model.image_size)
    return recipe, folder, "handwritten digits"


def _read_all(source: Source, size: int, threads: int) -> LabelledImages:
    batches = list(EvalLoader(source, size, 128, threads))
    return LabelledImages(torch.cat([p for p, _ in batches]), torch.cat([labels for _, labels in batches]))


def evaluate(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], bank: LabelledImages, queries: LabelledImages
) -> dict[str, Any]:
    """k-NN of raw pixels, of the run's own initial encoder, and of student and teacher at every checkpoint.

    Returns:
        `k`, `temperature`; per cent right at the end of the run by name, `top1` for `k` and `top1_by_k` for all; and
        `over_the_run`, for each checkpoint its `epoch`, `step`, and values by k of `student` and `teacher`.
    """
    _say(f"3/4 k-NN of raw pixels, the random encoder, and {len(checkpoints)} checkpoints")
    by_k = {
        "raw_pixels": _top1(pixel_features, bank, queries),
        "random_encoder": _top1(encoder_features(build_student(recipe).encoder.eval()), bank, queries),
    }
    history = []
    for checkpoint in checkpoints:
        trained = {
            name: _top1(encoder_features(load_encoder(checkpoint, kind)), bank, queries)
            for kind, name in zip(checkpoint.kinds, ("student", "teacher"), strict=False)
        }
        history.append({"epoch": checkpoint.epoch, "step": checkpoint.step, **trained})
        by_k |= trained
        _say(
            f"    epoch {checkpoint.epoch:g}: " + ", ".join(f"{name} {top1[K]:.1f} %" for name, top1 in trained.items())
        )
    return {
        "k": K,
        "temperature": TEMPERATURE,
        "top1": {name: top1[K] for name, top1 in by_k.items()},
        "top1_by_k": by_k,
        "over_the_run": history,
    }


def _top1(features: Features, bank: LabelledImages, queries: LabelledImages) -> dict[int, float]:
    known, asked = (
        (torch.cat([features(part) for part in images.pixels.split(256)]), images.labels) for images in (bank, queries)
    )
    return knn_top1(known, asked, KS, TEMPERATURE)


def _results(
    recipe: Recipe, folder: Path, knn: dict[str, Any], bank: LabelledImages, queries: LabelledImages
) -> dict[str, Any]:
    summary = summarise(run_metrics(folder), recipe.train.global_batch)
    return {
        "run": str(folder),
        "stopped_by": None,
        "step": summary.steps,
        "epochs": summary.epochs,
        "training_seconds": round(summary.seconds, 1),
        "images_per_second": round(summary.images_per_second, 1),
        "images": {"train": len(bank.labels), "val": len(queries.labels)},
        "knn": knn,
        "first_epoch": summary.first,
        "last_epoch": summary.last,
        "files": {name: str(folder / file) for name, file in FILES.items()},
    }


def _reconstructions(checkpoint: Checkpoint, images: LabelledImages, classes: Sequence[str]) -> Draw:
    """The first image of each class, as the student completes it."""
    chosen = [int((images.labels == label).nonzero()[0]) for label in images.labels.unique().tolist()[:SAMPLES]]
    noise = fixed_noise(len(chosen), checkpoint.recipe.model.patches)
    found = reconstruct(load_student(checkpoint), images.pixels[chosen], noise)
    return draw_reconstruction(found, [classes[int(images.labels[i])] for i in chosen], blocks=2)


def _write_outputs(recipe: Recipe, folder: Path, subject: str, results: dict[str, Any], panel: Draw) -> None:
    files = {name: Path(path) for name, path in results["files"].items()}
    write_aside(files["reconstruction"], png(panel))
    write_aside(files["knn"], png(draw_knn(results["knn"])))
    write_curves(folder, files["curves"])
    write_demo_page(files["report"], folder, recipe, subject, results, panel)
    write_aside(files["results"], (json.dumps(results, indent=1) + "\n").encode())


def _summary(results: dict[str, Any]) -> str:
    top1, images = results["knn"]["top1"], results["images"]
    random = top1["random_encoder"]
    lines = [
        f"k-NN top-1 on {images['val']} held-out images (k = {K}, {images['train']:,} training images to look among)"
    ]
    for name, value in top1.items():
        gain = f"   {value - random:+.1f} against the random encoder" if name in ("student", "teacher") else ""
        lines.append(f"  {NAMES[name]:15} {value:5.1f} %{gain}")
    lines.append(f"training took {results['training_seconds']:.0f} s; report: {results['files']['report']}")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
