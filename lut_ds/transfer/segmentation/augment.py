"""Augmentation of an image with its mask, from drawn numbers: random size, crop, flip, photometric distortion.

The protocol of ADE20K in BEiT, MAE and LUT. Everything is a function of the uniform draws given, so that a resumed run sees
the same pixels. Two details differ from that code, which reads with OpenCV: resizing is antialiased where it shrinks, and hue
has 256 steps instead of 180.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lut_ds.transfer.finetune_loader import FILL
from lut_ds.transfer.segmentation.folder import IGNORED

LONGEST = 4  # the longer side is at most so many times the shorter one's target
_TRIES = 10  # of a crop
DRAWS = 1 + 2 * _TRIES + 1  # size, crops, flip
PHOTOMETRIC_DRAWS = 9
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18.0 / 180.0


@dataclass(frozen=True)
class Geometry:
    """Sizes and probabilities of the augmentation, as the recipe's `data` says; `side` of the crop, pixels."""

    side: int
    scale: tuple[float, float]
    cat_max_ratio: float
    hflip: float


def fitted_size(height: int, width: int, shorter: float) -> tuple[int, int]:
    """(height, width) with the aspect kept: the shorter side becomes `shorter`, unless the longer exceeded 4 times that."""
    factor = min(shorter / min(height, width), LONGEST * shorter / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def augment(
    image: Image.Image, mask: Image.Image, draws: Sequence[float], how: Geometry
) -> tuple[Image.Image, Image.Image]:
    """Random size, crop and flip, the same of both.

    Args:
        image, mask: RGB and L of the same size.
        draws: `DRAWS` numbers in [0, 1).

    Returns:
        Both of side `how.side`; what an image is too small for is ImageNet's mean, and no class.
    """
    low, high = how.scale
    height, width = fitted_size(image.height, image.width, how.side * (low + (high - low) * draws[0]))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    mask = mask.resize((width, height), Image.Resampling.NEAREST)
    left, top = _choose_crop(np.asarray(mask), draws[1 : 1 + 2 * _TRIES], how)
    image, mask = _cropped(image, left, top, how.side, FILL), _cropped(mask, left, top, how.side, IGNORED)
    if draws[-1] < how.hflip:
        flip = Image.Transpose.FLIP_LEFT_RIGHT
        image, mask = image.transpose(flip), mask.transpose(flip)
    return image, mask


def _choose_crop(mask: NDArray[np.uint8], draws: Sequence[float], how: Geometry) -> tuple[int, int]:
    """Left and top of the first crop drawn in which no class has `cat_max_ratio` of the labelled pixels, else of the last."""
    spare = [max(size - how.side, 0) + 1 for size in (mask.shape[1], mask.shape[0])]
    left = top = 0
    for number in range(_TRIES):
        left, top = (int(draws[2 * number + i] * spare[i]) for i in range(2))
        counts = np.bincount(mask[top : top + how.side, left : left + how.side].ravel(), minlength=256)[:IGNORED]
        if how.cat_max_ratio >= 1 or (np.count_nonzero(counts) > 1 and counts.max() < how.cat_max_ratio * counts.sum()):
            break
    return left, top


def _cropped(picture: Image.Image, left: int, top: int, side: int, fill: int | tuple[int, ...]) -> Image.Image:
    box = (left, top, min(left + side, picture.width), min(top + side, picture.height))
    part = picture.crop(box)
    if part.size == (side, side):
        return part
    whole = Image.new(picture.mode, (side, side), fill)
    whole.paste(part, (0, 0))
    return whole


def distort(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """Photometric distortion (Liu et al., "SSD", ECCV 2016): brightness, contrast, saturation and hue, each in half of the cases.

    Args:
        draws: `PHOTOMETRIC_DRAWS` numbers in [0, 1).
    """
    pixels = np.asarray(image)
    if draws[0] < 0.5:
        pixels = _clipped(pixels + _BRIGHTNESS * (2 * draws[1] - 1))
    early = draws[2] < 0.5  # contrast before the colours, or after them
    factor = _between(_CONTRAST, draws[4]) if draws[3] < 0.5 else 1.0
    if early:
        pixels = _clipped(pixels * factor)
    pixels = _recoloured(pixels, draws[5:])
    return Image.fromarray(pixels if early else _clipped(pixels * factor))


def _recoloured(pixels: NDArray[np.uint8], draws: Sequence[float]) -> NDArray[np.uint8]:
    saturate, turn = draws[0] < 0.5, draws[2] < 0.5
    if not (saturate or turn):
        return pixels
    hsv = np.array(Image.fromarray(pixels).convert("HSV"))
    if saturate:
        hsv[..., 1] = _clipped(hsv[..., 1] * _between(_SATURATION, draws[1]))
    if turn:
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(256 * _HUE * (2 * draws[3] - 1))) % 256
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _clipped(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.clip(values, 0, 255).astype(np.uint8)
