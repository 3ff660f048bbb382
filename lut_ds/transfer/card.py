"""A model card: what an exported encoder is, how to load it, how it was trained and what was measured, each as recorded."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lut_ds.tracking import read_metrics
from lut_ds.transfer.evaluate import STUDENT, Request
from lut_ds.transfer.models import Pretrained
from lut_ds.transfer.robustness.corruptions import MEASURED

_EVALUATIONS = tuple(name + end for name in ("knn", "probe", "probe_mae", "robustness") for end in ("", STUDENT))
_HIDDEN = ("run",)  # sections of the recipe that are about a machine
_FRONT = """---
license: other # TO BE FILLED IN by whoever publishes this
library_name: {library}
tags:
- image-feature-extraction
{tags}---
"""
# Formats of files that are named for how they were trained: without labels.
_METHODS = ("lut", "mae", "moco_v3", "dino", "ibot")
_MASKED = ("lut", "mae", "ibot")
_LICENCE = (
    "**To be filled in by whoever publishes this.** The weights follow the licence that you give them and the terms of the data "
    "that they were trained on; neither is known to the program that wrote this page."
)
_USE = (
    "Features of images, for retrieval, probing and fine-tuning on classification, detection and segmentation. It {trained} "
    "not been examined for bias, safety or decisions about people: what it has learned is what its training images show. "
    "Evaluate it on your own data before you rely on it."
)


def model_card(source: str, found: Pretrained, library: str, loading: str, about: Mapping[str, Any]) -> str:
    """README.md of an export folder.

    Args:
        source: what was exported; evaluations of the same weights that were made of it with their default output are quoted.
        found: the encoder, as `load_model(source)` gives it.
        library: `timm`, `transformers` or `torch`.
        loading: Python that loads the export.
        about: `recipe` where it is known, and `top1`, `top5` of a fine-tuned classifier.
    """
    record = found.record
    base = Request(source).folders("knn")[0].parent  # evaluations/ of the run, or of this source
    run = base.parent if (base.parent / "checkpoints").is_dir() else None
    method = _method(found, about.get("recipe"))
    tags = "- masked-image-modeling\n" if method in _MASKED else ""
    sections = [
        ("", _what(found)),
        ("How to load", f"```python\n{loading}\n```\n\n{_pixels(found)}"),
        ("Results", _results(base, record["weights"], about)),
        ("Training", _training(run, record, about.get("recipe"))),
        ("Intended use", _USE.format(trained="was trained without labels and has" if method else "has")),
        ("Licence", _LICENCE),
    ]
    title = f"# {_name(found, method)}\n"
    text = "\n".join(f"## {head}\n\n{body}\n" if head else f"{body}\n" for head, body in sections if body)
    return f"{_FRONT.format(library=library, tags=tags)}\n{title}\n{text}"


def _method(found: Pretrained, recipe: Mapping[str, Any] | None) -> str | None:
    """How it was pre-trained, where that is told and no labels were used since."""
    layout = found.record["format"]
    return ((recipe or {}).get("method") or {}).get("name") or (
        layout if layout in _METHODS and not found.head else None
    )


def _name(found: Pretrained, method: str | None) -> str:
    sizes = found.record["sizes"]
    shape = f"ViT, width {sizes['width']}, depth {sizes['depth']}, patch {sizes['patch_size']}"
    return f"{shape}, pre-trained with {method}" if method else shape


def _what(found: Pretrained) -> str:
    record, sizes = found.record, found.record["sizes"]
    parameters = sum(p.numel() for p in found.model.parameters())
    rows = [
        ("weights", {"ema": "average of the student's (EMA)", "student": "the student's"}.get(record["kind"])),
        ("after", _when(record)),
        ("parameters", f"{parameters:,}"),
        ("images", f"{found.image_size} x {found.image_size} pixels, patches of {sizes['patch_size']}"),
        ("width, depth, heads", f"{sizes['width']}, {sizes['depth']}, {sizes['heads']}"),
        ("SHA-256 of the weights", f"`{record['weights']}`"),
    ]
    return _table(("", ""), rows)


def _when(record: Mapping[str, Any]) -> str | None:
    step = None if record["step"] is None else f"{record['step']:,} steps"
    epoch = None if record["epoch"] is None else f"epoch {record['epoch']:g}"
    return ", ".join(part for part in (step, epoch) if part) or None


def _pixels(found: Pretrained) -> str:
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (found.mean, found.std))
    resize = int(found.image_size / found.crop)
    return (
        f"Pixels: RGB, resized to {resize} at the shorter side (bicubic), centre crop {found.image_size}, scaled to [0, 1], "
        f"mean {mean}, deviation {std}."
    )


def _results(base: Path, weights: str, about: Mapping[str, Any]) -> str:
    """Numbers of evaluations of these very weights."""
    rows: list[tuple[str, str | None]] = []
    for name in _EVALUATIONS:
        found = _json(base / name / "results.json")
        with contextlib.suppress(
            LookupError, TypeError, AttributeError
        ):  # another version's: what it lacks is not quoted
            if found is not None and found["model"]["weights"] == weights:
                data = Path(found["data"]).name
                numbers = [(title, value) for title, value in _numbers(found) if value is not None]
                rows += [(f"{title} ({data})", f"{value:.2f} %") for title, value in numbers]
    if about.get("top1") is not None:
        rows.append(("fine-tuned, top-1 on its validation images", f"{about['top1']:.2f} %"))
    return (
        _table(("measured", "value"), rows) if rows else "None were found beside the run: `lut-ds knn`, `lut-ds probe`."
    )


def _numbers(found: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    kind, images = found["evaluation"], found.get("images", {})
    if kind == "knn":
        return [(f"k-NN top-1, k = {k}, {images['val']:,} images", value) for k, value in found["top1"].items()]
    if kind == "probe":
        return [(f"linear probe ({found['protocol']}) top-1, {images['val']:,} images", found["top1"])]
    limit = f", {found['limit']} images" if found["limit"] else ""
    head = found["classifier"]["head"]
    rows = [(f"{name} top-1, {head}{limit}", row["top1"]) for name, row in found["sets"].items()]
    corrupted = found.get("corruptions")
    if corrupted is None:
        return rows
    counted = sum(name in MEASURED for name in corrupted["top1"])
    title = f"mean corruption error, {counted} corruptions, {corrupted['images']}{limit}"
    return [*rows, (title, corrupted["mean_error"]), (f"mCE, {corrupted['images']}{limit}", corrupted["mce"])]


def _training(run: Path | None, record: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> str:
    """The recipe, the last measured loss up to this step, and the software of the last start."""
    parts = []
    if recipe is not None:
        kept = {name: dict(part) if isinstance(part, Mapping) else part for name, part in recipe.items()}
        kept = {name: part for name, part in kept.items() if name not in _HIDDEN}
        if isinstance(kept.get("data"), dict) and kept["data"].get("path"):
            kept["data"]["path"] = Path(str(kept["data"]["path"])).name  # folders of a machine say nothing elsewhere
        batch = (recipe.get("train") or {}).get("global_batch")
        if batch and record["step"]:
            parts.append(f"{record['step'] * batch:,} samples were seen.")
        parts.append(f"Recipe:\n\n```yaml\n{yaml.safe_dump(kept, sort_keys=False).strip()}\n```")
    if run is not None:
        metrics = [
            r for r in read_metrics(run / "metrics.jsonl") if record["step"] is None or r["step"] <= record["step"]
        ]
        if metrics and "loss" in metrics[-1]:
            parts.insert(0, f"Loss at step {metrics[-1]['step']:,}: {metrics[-1]['loss']:.4f}.")
        if environment := _last_line(run / "environment.jsonl"):
            parts.append(_environment(environment))
    return "\n\n".join(parts)


def _environment(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (found.get("versions") or {}).items())
    commit = (found.get("git") or {}).get("commit")
    state = f"; source {commit[:12]}" if commit else ""
    return f"Software: Python {found.get('python')}, {versions}{state}."


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _last_line(path: Path) -> dict[str, Any] | None:
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str | None]]) -> str:
    lines = [header, ("---", "---"), *((name, value) for name, value in rows if value)]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)
