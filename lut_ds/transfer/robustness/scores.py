"""Mean corruption error: over corruptions of the error over severities, as it is and in AlexNet's.

Hendrycks and Dietterich, ICLR 2019, equations of section 4.2, with the error rates of AlexNet on ImageNet-C that its code is
published with (clean: table 1).
"""

from collections.abc import Mapping
from typing import Any

from lut_ds.transfer.robustness.corruptions import MEASURED, SEVERITIES

ALEXNET_CLEAN = 43.5  # per cent wrong
ALEXNET = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
"""Per cent wrong, mean over the five severities."""


def corruption_scores(
    top1: Mapping[str, Mapping[int, float]], clean: float | None, classes: int, side: int
) -> dict[str, Any]:
    """Errors by corruption and their means.

    Args:
        top1: per cent right, by corruption and severity.
        clean: per cent right on the images as they are; None where they were not classified.
        classes, side: of the classifier.

    Returns:
        `error` by corruption (per cent, mean over its severities); `mean_error` over those of the 15 that were measured;
        `mce` and, with `clean`, `relative_mce`, per cent of AlexNet's, both None where they are not defined, and `no_mce`,
        why. The extra corruptions count in none of the means.
    """
    error = {name: 100.0 - sum(row.values()) / len(row) for name, row in top1.items()}
    counted = [name for name in error if name in MEASURED]
    scores: dict[str, Any] = {
        "error": error,
        "mean_error": sum(error[name] for name in counted) / len(counted) if counted else None,
        "mce": None,
        "relative_mce": None,
        "no_mce": _missing(top1, classes, side),
    }
    if scores["no_mce"] is None:
        scores["ce"] = {name: 100 * error[name] / ALEXNET[name] for name in MEASURED}
        scores["mce"] = sum(scores["ce"].values()) / len(MEASURED)
        if clean is not None:
            lost = [100 * (error[n] - (100 - clean)) / (ALEXNET[n] - ALEXNET_CLEAN) for n in MEASURED]
            scores["relative_mce"] = sum(lost) / len(MEASURED)
    return scores


def _missing(top1: Mapping[str, Mapping[int, float]], classes: int, side: int) -> str | None:
    """Why errors cannot be compared with AlexNet's."""
    if classes != 1000 or side != 224:
        return f"AlexNet's errors are for ImageNet's 1000 classes at 224 pixels, this is {classes} classes at {side}"
    absent = [name for name in MEASURED if name not in top1]
    if absent:
        return f"{len(absent)} of the 15 corruptions were not measured ({absent[0]}...)"
    if any(sorted(row) != list(SEVERITIES) for name, row in top1.items() if name in MEASURED):
        return "not all of the five severities were measured"
    return None
