"""What a view is: its parameters as a pure function of (seed, epoch, sample, view), and their exact PIL rendering.

LUT (main_lut.py of the reference): Resize(shorter side S, bicubic) -> reflect pad 4 -> random crop S -> flip; view 2
adds ColorJitter with probability .8 and exactly one of gray, solarize, blur. MAE: RandomResizedCrop(.2, 1) bicubic -> flip.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.rng import stream_geometry, stream_photometric, uniforms

if TYPE_CHECKING:
    from PIL.Image import Image

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
GRAY, SOLARIZE, BLUR = range(3)
NO_CHOICE = -1
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)
_TRIES = 10  # torchvision's RandomResizedCrop gives up after ten windows that do not fit


@dataclass(frozen=True)
class Photometric:
    """ColorJitter (four operators in random order, with probability `p`), then exactly one of gray, solarize, blur.

    Factors are U(1 - v, 1 + v), the hue shift U(-hue, hue) turns, the blur radius U(*blur_sigma) pixels.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    p: float = 0.8
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_threshold: int = 128


@dataclass(frozen=True)
class ViewSpec:
    """How one view is made. `pad` belongs to "resize_crop", `scale` and `ratio` to "random_resized_crop"."""

    kind: Literal["resize_crop", "random_resized_crop"]
    pad: int = 4
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    photometric: Photometric | None = None


LUT_VIEW1 = ViewSpec("resize_crop")
LUT_VIEW2 = ViewSpec("resize_crop", photometric=Photometric())
MAE_VIEW = ViewSpec("random_resized_crop")
EVAL_VIEW = ViewSpec("resize_crop", pad=0, hflip=0.0)


@dataclass(frozen=True)
class ViewParams:
    """Everything that is random in one view of n samples, as arrays of n rows; `row(i)` is the same for one.

    "resize_crop": the image is resized to `resize_hw`, and its window of `crop_hw` at `crop_yx` is taken; a window that leaves
    the image (by at most the pad) reflects at the edge. "random_resized_crop": the window `crop_yx`, `crop_hw` of the
    source is resized to `resize_hw`.
    """

    resize_hw: NDArray[np.int32]  # [n, 2]
    crop_yx: NDArray[np.int32]  # [n, 2]
    crop_hw: NDArray[np.int32]  # [n, 2]
    flip: NDArray[np.bool_]  # [n]
    jitter: NDArray[np.bool_]  # [n]
    op_order: NDArray[np.int32]  # [n, 4], a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE
    factors: NDArray[np.float64]  # [n, 4], indexed by operator: three factors around 1 and the hue shift in turns
    choice: NDArray[np.int32]  # [n] GRAY, SOLARIZE, BLUR or NO_CHOICE
    blur_sigma: NDArray[np.float64]  # [n] pixels

    def row(self, i: int) -> ViewParams:
        """The parameters of sample `i` alone."""
        return ViewParams(**{f.name: getattr(self, f.name)[i] for f in fields(self)})


def view_params(
    spec: ViewSpec,
    image_size: int,
    seed: int,
    epoch: int,
    samples: NDArray[np.int64],
    view_index: int,
    sizes_hw: NDArray[np.int32],
) -> ViewParams:
    """Draw view `view_index` of int64 `samples` [n], whose images measure `sizes_hw` [n, 2] pixels.

    Raises ValueError where the reflection would need more pixels than an image of `image_size` has.
    """
    if not 0 <= spec.pad < image_size:
        raise ValueError(f"view_params: pad must be in [0, image_size), found {spec.pad} for image_size {image_size}")
    u = uniforms(seed, epoch, samples, stream_geometry(view_index), 3 + 2 * _TRIES)
    if spec.kind == "resize_crop":
        resize_hw = resized_hw(sizes_hw, image_size)
        spare = resize_hw + 2 * spec.pad - image_size + 1
        crop_yx = np.floor(u[:, 0:2] * spare).astype(np.int32) - np.int32(spec.pad)
        crop_hw = np.full_like(resize_hw, image_size)
    else:
        resize_hw = np.full((len(samples), 2), image_size, np.int32)
        crop_yx, crop_hw = _resized_crop(spec, u[:, 0:2], u[:, 3:].reshape(-1, _TRIES, 2), sizes_hw)
    colour = _draw_photometric(spec.photometric, seed, epoch, samples, view_index)
    return ViewParams(resize_hw, crop_yx, crop_hw, u[:, 2] < spec.hflip, *colour)


def eval_params(image_size: int, sizes_hw: NDArray[np.int32], crop: float = 0.875) -> ViewParams:
    """Resize(int(S / crop), shorter side, bicubic) + CenterCrop(S) for images of `sizes_hw` [n, 2]: nothing random."""
    n = len(sizes_hw)
    resize_hw = resized_hw(sizes_hw, int(image_size / crop))
    crop_yx = np.round((resize_hw - image_size) / 2.0).astype(np.int32)
    off = np.zeros(n, np.bool_)
    colour = (np.tile(_ORDERS[0], (n, 1)), np.zeros((n, 4)), np.full(n, NO_CHOICE, np.int32), np.zeros(n))
    return ViewParams(resize_hw, crop_yx, np.full_like(resize_hw, image_size), off, off, *colour)


def resized_hw(sizes_hw: NDArray[np.int32], shorter: int) -> NDArray[np.int32]:
    """Sizes [n, 2] after torchvision's Resize(shorter): the longer side is truncated, int(shorter * long / short)."""
    sizes = sizes_hw.astype(np.int64)
    return (shorter * sizes // sizes.min(axis=1, keepdims=True)).astype(np.int32)


def _resized_crop(
    spec: ViewSpec, position: NDArray[np.float64], tries: NDArray[np.float64], sizes_hw: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """torchvision's RandomResizedCrop.get_params over uniforms `position` [n, 2] and `tries` [n, 10, 2] (area, aspect).

    The first of the ten windows that fits; otherwise the largest central window within the ratio bounds.
    """
    height, width = sizes_hw[:, 0].astype(np.float64), sizes_hw[:, 1].astype(np.float64)
    area = (height * width)[:, None] * (spec.scale[0] + tries[..., 0] * (spec.scale[1] - spec.scale[0]))
    low, high = np.log(spec.ratio[0]), np.log(spec.ratio[1])
    aspect = np.exp(low + tries[..., 1] * (high - low))
    w, h = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first, rows, found = fits.argmax(axis=1), np.arange(len(fits)), fits.any(axis=1)

    whole = width / height
    central_w = np.where(whole > spec.ratio[1], np.round(height * spec.ratio[1]), width)
    central_h = np.where(whole < spec.ratio[0], np.round(width / spec.ratio[0]), height)
    crop_h = np.where(found, h[rows, first], central_h)
    crop_w = np.where(found, w[rows, first], central_w)
    spare = np.stack([height - crop_h, width - crop_w], axis=1)
    crop_yx = np.where(found[:, None], np.floor(position * (spare + 1)), spare // 2)
    return crop_yx.astype(np.int32), np.stack([crop_h, crop_w], axis=1).astype(np.int32)


def _draw_photometric(
    p: Photometric | None, seed: int, epoch: int, samples: NDArray[np.int64], view_index: int
) -> tuple[NDArray[np.bool_], NDArray[np.int32], NDArray[np.float64], NDArray[np.int32], NDArray[np.float64]]:
    """jitter, op_order, factors, choice and blur_sigma of ViewParams."""
    n = len(samples)
    if p is None:
        no_order = np.tile(_ORDERS[0], (n, 1))
        return np.zeros(n, np.bool_), no_order, np.zeros((n, 4)), np.full(n, NO_CHOICE, np.int32), np.zeros(n)
    u = uniforms(seed, epoch, samples, stream_photometric(view_index), 8)
    factors = np.array([1, 1, 1, 0]) + (2 * u[:, 1:5] - 1) * np.array([p.brightness, p.contrast, p.saturation, p.hue])
    order = _ORDERS[np.floor(u[:, 5] * len(_ORDERS)).astype(np.int32)]
    choice = np.floor(u[:, 6] * 3).astype(np.int32)
    sigma = p.blur_sigma[0] + u[:, 7] * (p.blur_sigma[1] - p.blur_sigma[0])
    return u[:, 0] < p.p, order, factors, choice, sigma


def apply_reference(params: ViewParams, spec: ViewSpec, image: Image) -> NDArray[np.uint8]:
    """Render one row of parameters on a PIL image with PIL and torchvision, as published: uint8 [S, S, 3]."""
    from torchvision.transforms import InterpolationMode  # slow to import, and only people and tests need it
    from torchvision.transforms import functional as tf

    image = image.convert("RGB")
    y, x = (int(v) for v in params.crop_yx)
    h, w = (int(v) for v in params.crop_hw)
    size = [int(v) for v in params.resize_hw]
    if spec.kind == "resize_crop":
        padded = tf.pad(tf.resize(image, size, InterpolationMode.BICUBIC), spec.pad, padding_mode="reflect")
        image = tf.crop(padded, y + spec.pad, x + spec.pad, h, w)
    else:
        image = tf.resize(tf.crop(image, y, x, h, w), size, InterpolationMode.BICUBIC)
    if params.flip:
        image = tf.hflip(image)
    if params.jitter:
        adjust = (tf.adjust_brightness, tf.adjust_contrast, tf.adjust_saturation, tf.adjust_hue)
        for op in params.op_order:
            image = adjust[op](image, float(params.factors[op]))
    return np.asarray(_apply_choice(params, spec, image))


def _apply_choice(params: ViewParams, spec: ViewSpec, image: Image) -> Image:
    from PIL import ImageFilter, ImageOps

    if params.choice == GRAY:
        return image.convert("L").convert("RGB")
    if params.choice == SOLARIZE and spec.photometric is not None:
        return ImageOps.solarize(image, spec.photometric.solarize_threshold)
    if params.choice == BLUR:
        return image.filter(ImageFilter.GaussianBlur(float(params.blur_sigma)))
    return image
