"""The same run on 1 to 1,024 GPUs: with as many images for each (weak), and with the same global batch (strong)."""

from dataclasses import replace
from typing import Any

from lut_ds.bench.planner.fit import Fitter, Way
from lut_ds.bench.planner.timing import Cluster, StepTime, step_time

COUNTS = tuple(2**n for n in range(11))
WANTED, WANTED_GPUS = 0.95, 256


def _counts(gpus: int) -> list[int]:
    return sorted({*COUNTS, gpus})


def _row(gpus: int, images: int, time: StepTime) -> dict[str, Any]:
    return {
        "gpus": gpus,
        "global_batch": images,
        "step_s": time.total,
        "images_per_s": images / time.total,
        "limit": time.binding(images // gpus),
        "exposed_s": time.exposed,
    }


def _with_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add images/s a GPU over the most that any number of GPUs up to a row's gives.

    Not over a lone GPU's: that one updates the whole optimizer, of which each of many has a share, and would make two look like
    more than two.
    """
    best = 0.0
    for row in (row for row in rows if "images_per_s" in row):
        each = row["images_per_s"] / row["gpus"]
        best = max(best, each)
        row["efficiency"] = each / best
    return rows


def weak_scaling(way: Way, cluster: Cluster, mfu: float) -> list[dict[str, Any]]:
    """The chosen way on other numbers of GPUs.

    Whether the states of fewer GPUs would fit is not asked: the first rows are what the others are compared with.
    """
    rows: list[dict[str, Any]] = []
    share = way.micro_batch * way.accumulation
    for gpus in _counts(cluster.gpus):
        other = replace(cluster, gpus=gpus)
        time = step_time(way.recipe, way.config, other, way.micro_batch, way.accumulation, mfu)
        rows.append(_row(gpus, share * gpus, time))
    return _with_efficiency(rows)


def strong_scaling(fitter: Fitter) -> list[dict[str, Any]]:
    """The fastest way for each number of GPUs; `why_not` where there is none."""
    rows: list[dict[str, Any]] = []
    batch = fitter.recipe.train.global_batch
    for gpus in _counts(fitter.cluster.gpus):
        if batch % gpus:
            why = "more GPUs than images" if gpus > batch else "does not divide the global batch"
            rows.append({"gpus": gpus, "why_not": why})
            continue
        way = Fitter(fitter.recipe, replace(fitter.cluster, gpus=gpus), fitter.mfu, fitter.fixed).best()
        if way is None:
            rows.append({"gpus": gpus, "why_not": "does not fit"})
            continue
        rows.append({**_row(gpus, batch, way.time), "overrides": way.words(), "accumulation": way.accumulation})
    return _with_efficiency(rows)


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
