"""Mixup and CutMix of a micro-batch with drawn parameters, and the soft targets of the mixture.

mixup: Zhang et al., ICLR 2018; CutMix: Yun et al., ICCV 2019; both against the batch in reverse order and with one weight
for the batch, as timm's `Mixup(mode="batch")`, which draws from numpy's global generator and so could not be resumed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import mixup_target
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """How a micro-batch is mixed with itself reversed: `weight` stays of each image and its label.

    Attributes:
        weight: in [0, 1]; 1 leaves the batch as it is.
        box: CutMix's pixels [top, bottom, left, right) that come from the other image; None: mixup.
    """

    weight: float = 1.0
    box: tuple[int, int, int, int] | None = None


def draw_mixing(
    random: np.random.Generator, image_size: int, mixup: float, cutmix: float, prob: float, switch_prob: float
) -> Mixing:
    """Draw a batch's mixing.

    Args:
        mixup, cutmix: parameters of the Beta distributions; 0: not used.
        prob: that the batch is mixed at all.
        switch_prob: of CutMix where both are used.
    """
    mixed, switch = random.random(2)
    if (mixup <= 0 and cutmix <= 0) or mixed >= prob:
        return Mixing()
    use_cutmix = cutmix > 0 and (mixup <= 0 or switch < switch_prob)
    alpha = cutmix if use_cutmix else mixup
    weight = float(random.beta(alpha, alpha))
    if not use_cutmix:
        return Mixing(weight)
    row, column = random.integers(0, image_size, 2).tolist()
    return cut(weight, row, column, image_size)


def cut(weight: float, row: int, column: int, image_size: int) -> Mixing:
    """CutMix's box of area 1 - weight around a pixel, clipped to the image; the weight follows what is left of it."""
    side = int(image_size * np.sqrt(1 - weight))
    top, left = max(row - side // 2, 0), max(column - side // 2, 0)
    bottom, right = min(row + (side + 1) // 2, image_size), min(column + (side + 1) // 2, image_size)
    return Mixing(1.0 - (bottom - top) * (right - left) / image_size**2, (top, bottom, left, right))


def mix_images(images: Tensor, mixing: Mixing) -> Tensor:
    """float [B, C, S, S] mixed with itself reversed."""
    if mixing.weight == 1.0:
        return images
    other = images.flip(0)
    if mixing.box is None:
        return images * mixing.weight + other * (1.0 - mixing.weight)
    top, bottom, left, right = mixing.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    return mixed


def soft_targets(labels: Tensor, classes: int, mixing: Mixing, smoothing: float) -> Tensor:
    """int64 [B] -> float32 [B, classes]: smoothed one-hot rows, mixed as the images."""
    return mixup_target(labels, classes, mixing.weight, smoothing)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of `logits` [B, classes], in float32, with soft `targets` [B, classes]: 0-dim."""
    return -(targets * torch.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()
