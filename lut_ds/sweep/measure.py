"""What a sweep records of a finished run: how it trained, and what its frozen encoder is worth."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lut_ds.analysis import attention_distance
from lut_ds.analysis.curves import run_metrics
from lut_ds.analysis.report import summarise
from lut_ds.analysis.spectrum import centred_spectrum, effective_rank
from lut_ds.analysis.subject import Subject, as_lists
from lut_ds.config import Recipe
from lut_ds.data.loader import EvalLoader
from lut_ds.data.sources import Source
from lut_ds.engine.build import flops_shape
from lut_ds.engine.files import write_text_atomically
from lut_ds.engine.runfolder import FREE
from lut_ds.engine.sweepfile import Entry
from lut_ds.method.flops import step_flops
from lut_ds.transfer.features import Compute, Features, computing, extract
from lut_ds.transfer.knn import extract_features, knn_top1, pixel_features
from lut_ds.transfer.labelled import open_labelled
from lut_ds.transfer.load import find_checkpoint
from lut_ds.transfer.models import Pretrained, load_model
from lut_ds.transfer.probe import Sweep, probe_features

RECORD = "sweep.json"  # in the run folder
KS = (10, 20)
IMAGES = 256  # whose attention is measured
BATCH = 256


def learned(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides the weights that come out: JSON values by section."""
    tree = json.loads(recipe.model_dump_json())
    free = FREE - {"train.max_steps", "precision.teacher"}
    kept = {name: section for name, section in tree.items() if name not in ("guard", "run")}
    sections = {
        name: {key: value for key, value in section.items() if f"{name}.{key}" not in free}
        for name, section in kept.items()
    }
    return {**sections, "run": {"seed": recipe.run.seed}}


def stored_record(entry: Entry) -> dict[str, Any] | None:
    """The record in a run's folder, of whatever recipe; None without one that can be read."""
    try:
        record = json.loads((entry.folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def recorded(entry: Entry, evaluate: Sequence[str]) -> dict[str, Any] | None:
    """The record of a run that was finished and evaluated so before; None if there is work to do."""
    record = stored_record(entry) or {}
    try:
        same = _same(record["recipe"], entry.recipe) and set(evaluate) <= set(record["evaluated"])
    except (KeyError, TypeError, AttributeError):
        return None
    return record if same else None


def _same(stored: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a stored recipe is that of `recipe`; a key younger than the record had its default."""
    defaults = learned(Recipe())
    return all(
        stored.get(section, {}).get(key, defaults[section][key]) == value
        for section, values in learned(recipe).items()
        for key, value in values.items()
    )


def record_run(entry: Entry, data: Mapping[str, Any], evaluate: Sequence[str], threads: int) -> None:
    """Evaluate a finished run's weights, student's and average's, and write the record into its folder.

    Args:
        data: `identity` of its images.

    Raises:
        UserError: no checkpoint there, or no classes to tell apart.
        RunFault: an image that cannot be read, or features that are not finite.
    """
    recipe, checkpoint = entry.recipe, find_checkpoint(entry.folder)
    train, val = open_labelled(str(recipe.data.path))
    found = {}
    with computing(BATCH, threads) as compute:
        for kind in checkpoint.kinds:
            model = load_model(entry.folder, kind)
            found[kind] = _evaluate(model, train, val, evaluate, entry.folder / "evaluations" / "features", compute)
    record = {
        "name": entry.name,
        "seed": entry.seed,
        "recipe": learned(recipe),
        "data": dict(data),
        "evaluated": list(evaluate),
        "training": _training(entry, checkpoint.step),
        "found": found,
    }
    write_text_atomically(entry.folder / RECORD, json.dumps(record, indent=1) + "\n")


def recorded_pixels(path: Path, recipe: Recipe, data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of raw pixels of these images at this size; None if there is none."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        same = record["data"] == data and record["size"] == recipe.model.image_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if same else None


def record_pixels(recipe: Recipe, data: Mapping[str, Any], path: Path, threads: int) -> None:
    """k-NN and probe of the pixels themselves, as `record_run` for an encoder."""
    train, val = open_labelled(str(recipe.data.path))
    size = recipe.model.image_size
    bank, queries = (extract_features(pixel_features, s, size, BATCH, threads) for s in (train, val))
    with computing(BATCH, threads) as compute:
        probed, _ = probe_features(bank, queries, train.classes, Sweep(), compute.ranks)
    record = {
        "images": {"train": len(train), "val": len(val)},
        "classes": len(train.classes),
        "data": dict(data),
        "size": size,
        "found": {"knn": {str(k): top1 for k, top1 in knn_top1(bank, queries, KS).items()}, "probe": probed["top1"]},
    }
    write_text_atomically(path, json.dumps(record, indent=1) + "\n")


def _training(entry: Entry, steps: int) -> dict[str, Any]:
    recipe = entry.recipe
    summary = summarise(run_metrics(entry.folder), recipe.train.global_batch)
    flops = step_flops(flops_shape(recipe))["total"] * recipe.train.global_batch * steps
    return {
        "steps": steps,
        "epochs": summary.epochs,
        "images": steps * recipe.train.global_batch,
        "tflop": flops / 1e12,
        "seconds": round(summary.seconds, 1),
        "last_epoch": summary.last,
    }


def _evaluate(
    model: Pretrained, train: Source, val: Source, evaluate: Sequence[str], cache: Path, compute: Compute
) -> dict[str, Any]:
    """By evaluation: k-NN top-1 by k, probe top-1 (per cent); mean attention distance by layer (pixels); singular values."""
    found: dict[str, Any] = {}
    queries = extract(model, "mean", val, "val", cache, compute)
    if {"knn", "probe"} & set(evaluate):
        bank = extract(model, "mean", train, "train", cache, compute)
        both = (_pair(bank), _pair(queries))
        if "knn" in evaluate:
            there = (_pair(bank, compute.ranks.device), _pair(queries, compute.ranks.device))
            found["knn"] = {str(k): top1 for k, top1 in knn_top1(*there, KS).items()}
        if "probe" in evaluate:
            found["probe"] = probe_features(*both, train.classes, Sweep(), compute.ranks)[0]["top1"]
    if "spectrum" in evaluate:
        values = centred_spectrum(queries.values)
        found["spectrum"] = {"effective_rank": effective_rank(values), "values": as_lists(values / values[:1])}
    if "attention_distance" in evaluate:
        numbers = attention_distance.measure(_subject(model, val, compute)).numbers
        found["attention_distance"] = {
            "mean": float(np.mean(numbers["by_layer"])),
            **{key: numbers[key] for key in ("by_layer", "uniform", "images")},
        }
    return found


def _pair(features: Features, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return features.values.to(device), features.labels.to(device)


def _subject(model: Pretrained, val: Source, compute: Compute) -> Subject:
    """The model with images spread evenly over `val`."""
    chosen = np.unique(np.linspace(0, len(val) - 1, min(IMAGES, len(val))).round().astype(np.int64))
    loader = EvalLoader(val, model.image_size, compute.batch_size, compute.threads, chosen)
    batches = list(loader)
    model.model.to(compute.ranks.device)
    return Subject(
        "encoder",
        model.model,
        torch.cat([pixels for pixels, _ in batches]),
        torch.cat([labels for _, labels in batches]),
        model.normalised,
        lambda images: model.features(images, "mean"),
    )
