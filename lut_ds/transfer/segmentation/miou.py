"""Mean intersection over union from a confusion matrix."""

from typing import Any

import torch
from torch import Tensor

from lut_ds.transfer.segmentation.folder import IGNORED


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes]: pixels of class i (rows) that were called j (columns); `truth` 255 does not count."""
    counted = truth != IGNORED
    pairs = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def scores(matrix: Tensor) -> dict[str, Any]:
    """Of a confusion matrix, per cent.

    Returns:
        `miou`: mean over classes that occur (in truth or prediction) of intersection over union; `macc`: mean over classes
        that are there of the share found; `aacc`: share of all pixels that are right; `iou`: by class, None where it does not
        occur.
    """
    matrix = matrix.double()
    right, there, said = matrix.diag(), matrix.sum(1), matrix.sum(0)
    union = there + said - right
    iou, accuracy = 100 * right / union, 100 * right / there  # 0/0 is NaN: a class that does not occur
    return {
        "miou": iou.nanmean().item(),
        "macc": accuracy.nanmean().item(),
        "aacc": (100 * right.sum() / there.sum()).item(),
        "iou": [None if value != value else value for value in iou.tolist()],
    }
