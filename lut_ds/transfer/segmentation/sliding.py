"""Prediction for images of any size by overlapping windows, whose logits are averaged."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lut_ds.transfer.finetune_loader import FILL

_CLASSES = 16  # resized at a time: logits of a large photo at 150 classes would take gigabytes

Logits = Callable[[Tensor], Tensor]


def starts(size: int, side: int, stride: int) -> list[int]:
    """Where windows of `side` begin along an axis: `stride` apart, the last one moved back to end with the image."""
    count = -(-max(size - side, 0) // stride) + 1
    return [min(i * stride, max(size - side, 0)) for i in range(count)]


def passes(height: int, width: int, side: int, stride: int, batch: int) -> int:
    """Forward passes of `batch` windows that an image takes."""
    return -(-len(starts(height, side, stride)) * len(starts(width, side, stride)) // batch)


def slide(logits: Logits, pixels: Tensor, side: int, stride: int, batch: int) -> Tensor:
    """Logits of a whole image: of each pixel the mean over the windows that hold it.

    Args:
        logits: uint8 [b, side, side, 3] -> float32 [b, classes, side, side].
        pixels: uint8 [H, W, 3]; below `side` it is filled up with ImageNet's mean, which does not count.
        side, stride: of the windows; batch: windows of a call, filled up with the last one.

    Returns:
        float32 [classes, H, W].
    """
    height, width = pixels.shape[:2]
    if min(height, width) < side:
        whole = pixels.new_tensor(FILL).expand(max(height, side), max(width, side), 3).contiguous()
        whole[:height, :width] = pixels
        pixels = whole
    corners = [(y, x) for y in starts(height, side, stride) for x in starts(width, side, stride)]
    total, count = None, torch.zeros(pixels.shape[:2], device=pixels.device)
    for first in range(0, len(corners), batch):
        own = corners[first : first + batch]
        filled = own + own[-1:] * (batch - len(own))
        found = logits(torch.stack([pixels[y : y + side, x : x + side] for y, x in filled]))
        if total is None:
            total = found.new_zeros((found.shape[1], *pixels.shape[:2]))
        for (y, x), one in zip(own, found):
            total[:, y : y + side, x : x + side] += one
            count[y : y + side, x : x + side] += 1
    assert total is not None
    return (total / count)[:, :height, :width]


def classes_at(logits: Tensor, height: int, width: int) -> Tensor:
    """The largest of float [classes, h, w] resized to `height` x `width` (bilinear): int64 [height, width]."""
    best, chosen = None, torch.zeros((height, width), dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), _CLASSES):
        part = logits[None, first : first + _CLASSES]
        part = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)
        values, index = part[0].max(dim=0)
        better = values > best if best is not None else torch.ones_like(values, dtype=torch.bool)
        chosen = torch.where(better, index + first, chosen)
        best = torch.where(better, values, best) if best is not None else values
    return chosen
