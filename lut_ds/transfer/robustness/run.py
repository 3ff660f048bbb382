"""`lut-ds robustness`: from a checkpoint and folders of images to results.json, tables and a picture.

EVALUATIONS/robustness/measured.jsonl   a line a condition; what is in it is not measured again
    head.safetensors, head.json         the probe of a checkpoint without a classifier
    results.json, results.md, results.csv, robustness.png
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lut_ds.analysis.figures import png, write_aside
from lut_ds.analysis.robustness import draw_robustness
from lut_ds.data.outputs import check_writable
from lut_ds.data.progress import progress_bar
from lut_ds.transfer.evaluate import Request, own_data
from lut_ds.transfer.features import Compute, computing
from lut_ds.transfer.labelled import open_labelled
from lut_ds.transfer.probe_accuracy import write_results
from lut_ds.transfer.robustness.classifier import Classifier, load_subject, own_classifier, probed_classifier
from lut_ds.transfer.robustness.kept import Kept
from lut_ds.transfer.robustness.measure import Pass, measure
from lut_ds.transfer.robustness.plan import Told, Wanted, plan
from lut_ds.transfer.robustness.scores import corruption_scores
from lut_ds.transfer.robustness.tables import csv_table, markdown

Measured = dict[str, dict[float, dict[str, Any]]]
"""By name of a pass and value: what `measure` returns."""


def evaluate_robustness(request: Request, wanted: Wanted) -> dict[str, Any]:
    """Measure, or take from an earlier run what it measured.

    A checkpoint without a classifier gets a linear probe on its frozen features, for which the data need training images.

    Raises:
        UserError: a model, data or sets that cannot be evaluated; nothing is computed or written then.
        RunFault: an image that cannot be decoded, or logits that are not finite.
    """
    data = request.data or own_data(request.source)
    wanted.check(data)
    output, cache = request.folders("robustness")
    check_writable(output=output, cache=cache)
    found = load_subject(request.source, request.kind, request.image_size, request.heads)
    labelled = None if found.head else open_labelled(data)
    classes = found.classes if labelled is None else labelled[0].classes
    count = len(found.head["head.weight"]) if labelled is None else len(classes)
    with computing(request.batch_size, request.threads, request.precision) as compute:
        with ThreadPoolExecutor(compute.threads) as workers:
            passes = plan(wanted, data, Told(found, classes if len(classes) == count else (), count), workers)
            if labelled is None:
                classifier = own_classifier(found, compute)
            else:
                classifier = probed_classifier(found, request.pool, labelled, cache, output, compute)
            kept = Kept(output / "measured.jsonl", classifier.fingerprint, wanted.limit, wanted.seed)
            measured, new = _all(classifier, passes, wanted.limit, kept, compute)
        results = _results(classifier, measured, request, wanted, data, passes)
        results |= {"measured": new, "output": str(output)}
        if compute.ranks.main:
            _write(output, results)
    return results


def _all(
    classifier: Classifier, passes: Sequence[Pass], limit: int | None, kept: Kept, compute: Compute
) -> tuple[Measured, int]:
    """Results of every condition, and how many of them are new."""
    found: Measured = {}
    missing: list[tuple[Pass, list[float]]] = []
    for step in passes:
        before = {value: kept.get(step.condition(value), step.images) for value in step.values}
        if compute.ranks.world_size > 1:
            shared = [before]
            dist.broadcast_object_list(shared, src=0)  # rank 0's disk decides
            before = shared[0]
        found.setdefault(step.name, {}).update({v: r for v, r in before.items() if r is not None})
        if values := [value for value, result in before.items() if result is None]:
            missing.append((step, values))
    shares = [len(step.images.indices(limit)[compute.ranks.rank :: compute.ranks.world_size]) for step, _ in missing]
    total = sum(share * len(values) for share, (_, values) in zip(shares, missing, strict=True))
    with progress_bar("robustness", total) as bar:
        for step, values in missing:
            bar.set_description(step.name, refresh=False)
            advance: Callable[[int], Any] = bar.update
            for value, result in zip(values, measure(classifier, step, values, limit, compute, advance), strict=True):
                found[step.name][value] = result
                if compute.ranks.main:
                    kept.put(step.condition(value), step.images, result)
    return found, sum(len(values) for _, values in missing)


def _results(
    classifier: Classifier, measured: Measured, request: Request, wanted: Wanted, data: str, passes: Sequence[Pass]
) -> dict[str, Any]:
    sets = {name: rows[0] for name, rows in measured.items() if 0 in rows}
    tops = {name: {v: row["top1"] for v, row in sorted(rows.items())} for name, rows in measured.items()}
    corrupted = {name[2:]: {int(v): t for v, t in rows.items()} for name, rows in tops.items() if name[:2] == "c/"}
    side = classifier.found.image_size
    clean = sets["clean"]["top1"] if "clean" in sets else None
    hidden = {name.partition("/")[2]: rows for name, rows in tops.items() if name.startswith("occlusion/")}
    results: dict[str, Any] = {
        "evaluation": "robustness",
        "model": classifier.found.record,
        "classifier": classifier.about,
        "data": os.path.abspath(data),
        "limit": wanted.limit,
        "seed": wanted.seed,
        "precision": request.precision,
        "sets": sets,
    }
    if corrupted:
        computed = any(step.name.startswith("c/") and step.images.name == "clean" for step in passes)
        results["corruptions"] = {
            "images": "computed" if computed else "downloaded",
            "top1": {name: {str(v): t for v, t in rows.items()} for name, rows in corrupted.items()},
            **corruption_scores(corrupted, clean, classifier.count, side),
        }
    if hidden:
        results["occlusion"] = {name: {f"{v:g}": t for v, t in rows.items()} for name, rows in hidden.items()}
    if "shuffle" in tops:
        results["shuffle"] = {f"{v:g}": t for v, t in tops["shuffle"].items()}
    return results


def _write(output: Path, results: dict[str, Any]) -> None:
    write_results(output / "results.json", results)
    write_aside(output / "results.md", markdown(results).encode())
    write_aside(output / "results.csv", csv_table(results).encode())
    write_aside(output / "robustness.png", png(lambda theme: draw_robustness(theme, results)))
