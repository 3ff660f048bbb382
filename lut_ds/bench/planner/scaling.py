"""The same run on 1 to 1,024 GPUs: with as many images for each (weak), and with the same global batch (strong)."""

from dataclasses import replace
from typing import Any

from lut_ds.bench.planner.fit import Fitter, Way
from lut_ds.bench.planner.timing import Cluster, StepTime, step_time

COUNTS = tuple(2**n for n in range(11))
WANTED, WANTED_GPUS = 0.95, 256


def _counts(gpus: int) -> list[int]:
    return sorted({*COUNTS, gpus})


def _row(gpus: int, images: int, time: StepTime, alone: float) -> dict[str, Any]:
    rate = images / time.total
    return {
        "gpus": gpus,
        "global_batch": images,
        "step_s": time.total,
        "images_per_s": rate,
        "efficiency": rate / gpus / alone,
        "limit": time.binding(images // gpus),
        "exposed_s": time.exposed,
    }


def weak_scaling(way: Way, cluster: Cluster, mfu: float) -> list[dict[str, Any]]:
    """The chosen way on other numbers of GPUs; efficiency is images/s a GPU over those of a lone one.

    Whether the states of fewer GPUs would fit is not asked: the first row is what the others are compared with.
    """
    rows: list[dict[str, Any]] = []
    share = way.micro_batch * way.accumulation
    for gpus in _counts(cluster.gpus):
        other = replace(cluster, gpus=gpus)
        time = step_time(way.recipe, way.config, other, way.micro_batch, way.accumulation, mfu)
        alone = rows[0]["images_per_s"] if rows else share / time.total
        rows.append(_row(gpus, share * gpus, time, alone))
    return rows


def strong_scaling(fitter: Fitter) -> list[dict[str, Any]]:
    """The fastest way for each number of GPUs; efficiency is against the fewest on which the run fits."""
    rows: list[dict[str, Any]] = []
    batch, alone = fitter.recipe.train.global_batch, None
    for gpus in _counts(fitter.cluster.gpus):
        if batch % gpus:
            why = "more GPUs than images" if gpus > batch else "does not divide the global batch"
            rows.append({"gpus": gpus, "why_not": why})
            continue
        way = Fitter(fitter.recipe, replace(fitter.cluster, gpus=gpus), fitter.mfu, fitter.fixed).best()
        if way is None:
            rows.append({"gpus": gpus, "why_not": "does not fit"})
            continue
        alone = alone or batch / way.time.total / gpus
        rows.append({**_row(gpus, batch, way.time, alone), "overrides": way.words(), "accumulation": way.accumulation})
    return rows


def weak_target(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether weak scaling reaches WANTED on WANTED_GPUS, and what costs most there."""
    row = next(row for row in rows if row["gpus"] == WANTED_GPUS)
    costs = sorted(row["exposed_s"].items(), key=lambda item: -item[1])
    reason = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in costs if seconds > 1e-4)
    return {
        "gpus": WANTED_GPUS,
        "wanted": WANTED,
        "predicted": row["efficiency"],
        "reached": row["efficiency"] >= WANTED,
        "not_hidden": f"of a step of {row['step_s'] * 1e3:.0f} ms: {reason}" if reason else "nothing",
    }
