"""The numbers by which runs are compared: the main ones of each evaluation that a run folder holds."""

import contextlib
from collections.abc import Mapping
from typing import Any

from lut_ds.analysis.runs import RunRecord

NAMES = {"knn": "k-NN", "probe": "linear probe", "probe_mae": "linear probe (MAE's protocol)"}
SCORES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}
"""Keys of evaluations.jsonl, per cent."""
_WORST = {"mean_error": "mean corruption error", "mce": "mCE"}


def headline(run: RunRecord) -> dict[str, float]:
    """The main numbers of each evaluation by name, per cent."""
    found: dict[str, float] = {}
    for folder, results in run.evaluations.items():
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):  # incomplete: the page says so
            for key, value in _main(results).items():
                found[f"{_named(folder)} {key}"] = value
    if isinstance(knn := run.results.get("knn"), dict):
        for name, value in knn.get("top1", {}).items():
            found[f"demo's k-NN top-1, {name.replace('_', ' ')}"] = value
    for key in ("top1", "miou"):
        if values := [score[key] for score in run.scores if score.get(key) is not None]:
            found[f"best {SCORES[key]} on val"] = max(values)
    return found


def _named(folder: str) -> str:
    """What was evaluated, from the name of its folder."""
    name = folder.removesuffix("_student")
    return NAMES.get(name, name) + (" of the student" if name != folder else "")


def _main(results: Mapping[str, Any]) -> dict[str, float]:
    """What stands for a results.json: top-1 (of several by k, the best), that of each set of images, and corruption errors."""
    found: dict[str, float] = {}
    top1 = results.get("top1")
    if isinstance(top1, int | float):
        found["top-1"] = float(top1)
    elif isinstance(top1, dict) and top1:
        best = max(top1, key=lambda k: top1[k])
        found[f"top-1 (k = {best})"] = float(top1[best])
    for name, row in results.get("sets", {}).items():
        found[f"top-1 on {name}"] = float(row["top1"])
    for key, label in _WORST.items():
        if (value := results.get("corruptions", {}).get(key)) is not None:
            found[label] = float(value)
    return found
