"""A data set without a download: ten shapes, drawn so that no linear function of the pixels tells them.

Everything but the shape varies from image to image: position, scale, rotation, aspect, bright on dark or dark on bright, the
tints of both, a background of two colours that flow into each other, light that falls off, noise. The mean image of every class
is about the same.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lut_ds.data.generated import write_set
from lut_ds.data.progress import progress_bar
from lut_ds.errors import UserError

Array = NDArray[np.float32]

Shape = Callable[[Array, Array], NDArray[np.bool_]]
"""Inside or not, of coordinates [b, S, S] in which the shape is about 2 wide."""


def _heart(u: Array, v: Array) -> NDArray[np.bool_]:
    x, y = 1.2 * u, 0.15 - 1.2 * v
    return (x**2 + y**2 - 0.8) ** 3 < x**2 * y**3


def _star(u: Array, v: Array) -> NDArray[np.bool_]:
    part = np.abs((np.arctan2(u, -v) / (2 * np.pi / 5) + 0.5) % 1 - 0.5)  # 0 at a point, 1/2 between two
    return np.hypot(u, v) < 1 / (1 + 3.2 * part)


SHAPES: dict[str, Shape] = {
    "disc": lambda u, v: u**2 + v**2 < 0.72,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.75,
    "triangle": lambda u, v: (v < 0.65) & (v > 1.9 * np.abs(u) - 0.95),
    "star": _star,
    "plus": lambda u, v: (np.maximum(np.abs(u), np.abs(v)) < 0.95) & (np.minimum(np.abs(u), np.abs(v)) < 0.3),
    "ring": lambda u, v: (u**2 + v**2 < 0.95) & (u**2 + v**2 > 0.36),
    "crescent": lambda u, v: (u**2 + v**2 < 0.95) & ((u - 0.45) ** 2 + v**2 > 0.6),
    "bar": lambda u, v: (np.abs(u) < 1) & (np.abs(v) < 0.32),
    "heart": _heart,
    "corner": lambda u, v: (np.maximum(np.abs(u), np.abs(v)) < 0.9) & ((u < -0.35) | (v > 0.35)),
}

CLASSES = sorted(SHAPES)
SPLITS = ("train", "val")
_DRAWS = 30  # uniform numbers that an image has
_OVER = 2  # points a pixel side
_AT_ONCE = 64
_QUALITY = 95
SIDES = range(16, 513)


def write_shapes(path: Path, images: int, val_images: int, size: int = 32, seed: int = 0) -> Path:
    """Write path/{train,val}/<class>/<number>.jpg: `images` and `val_images` images of side `size`, pixels; returns `path`.

    A larger set of the same size and seed begins with the images of a smaller one. See `generated.write_set`.

    Raises:
        UserError: fewer images than classes, a side outside of SIDES, or a folder that holds something else.
    """
    counts = {"train": images, "val": val_images}
    few = next((split for split, count in counts.items() if count < len(CLASSES)), None)
    if few is not None:
        raise UserError(
            f"shapes: expected at least {len(CLASSES)} {few} images, one a class, found {counts[few]}; ask for more"
        )
    if size not in SIDES:
        raise UserError(f"shapes: expected a size from {SIDES[0]} to {SIDES[-1]} pixels, found {size}; choose another")
    settings = {"version": 1, "images": images, "val_images": val_images, "size": size, "seed": seed}

    def write(folder: Path) -> list[str]:
        for split, name in itertools.product(SPLITS, CLASSES):
            (folder / split / name).mkdir(parents=True)
        names = []
        with progress_bar("shapes", images + val_images, unit="image") as bar:
            for split, first in ((s, i) for s in SPLITS for i in range(0, counts[s], _AT_ONCE)):
                numbers = range(first, min(first + _AT_ONCE, counts[split]))
                for number, pixels in zip(numbers, render(split, numbers, size, seed), strict=True):
                    names.append(f"{split}/{CLASSES[number % len(CLASSES)]}/{number:07d}.jpg")
                    Image.fromarray(pixels).save(folder / names[-1], quality=_QUALITY, subsampling=0)
                bar.update(len(numbers))
        return names

    return write_set(path, "shapes", settings, write)


def render(split: str, indices: range, size: int, seed: int) -> NDArray[np.uint8]:
    """Images of a split by their numbers: uint8 [n, S, S, 3]. The class of number i is CLASSES[i % len(CLASSES)].

    An image depends on its split, number, `size` and `seed` alone.
    """
    keys = [(seed, SPLITS.index(split) << 32 | i) for i in indices]
    generators = [np.random.Generator(np.random.Philox(key=np.array(key, np.uint64))) for key in keys]
    draws = np.stack([g.random(_DRAWS, dtype=np.float32) for g in generators])
    noise = np.stack([g.standard_normal((size, size, 3), dtype=np.float32) for g in generators])
    found = np.empty((len(draws), size * _OVER, size * _OVER, 3), np.float32)
    for name, shape in SHAPES.items():
        rows = np.flatnonzero([CLASSES[i % len(CLASSES)] == name for i in indices])
        if len(rows):
            found[rows] = _draw(shape, draws[rows], size)
    small = found.reshape(len(draws), size, _OVER, size, _OVER, 3).mean(axis=(2, 4)) + 0.015 * noise
    return np.round(np.clip(small, 0, 1) * 255).astype(np.uint8)


def _draw(shape: Shape, draws: Array, size: int) -> Array:
    """One class: draws [b, k] -> colours in about [0, 1], float32 [b, S*_OVER, S*_OVER, 3]."""
    d = iter(draws.T[:, :, None, None])  # [b, 1, 1] each

    def between(low: float, high: float) -> Array:
        return (low + (high - low) * next(d)).astype(np.float32)

    steps = ((np.arange(size * _OVER, dtype=np.float32) + 0.5) / (size * _OVER) * 2 - 1)[None]
    x, y = np.broadcast_arrays(steps[:, None, :], steps[:, :, None])  # the image is [-1, 1]^2
    half, aspect, angle = between(0.48, 0.76), between(0.87, 1.15), between(-0.7, 0.7)
    dx, dy = ((x - between(-1, 1) * (0.95 - half)) / half, (y - between(-1, 1) * (0.95 - half)) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = (cos * dx + sin * dy) * aspect, (cos * dy - sin * dx) / aspect
    inside = shape(u.astype(np.float32), v.astype(np.float32))
    hills = sum(
        np.sin(between(-3.5, 3.5) * x + between(-3.5, 3.5) * y + between(0, 2 * np.pi)) for _ in range(2)
    )  # from -2 to 2
    low, high, bright, dark = (_gray(d, *span) for span in ((0.38, 0.5), (0.5, 0.62), (0.75, 1), (0, 0.25)))
    ground = low + (0.5 + 0.25 * hills)[..., None] * (high - low)
    front = np.where(next(d)[..., None] < 0.5, bright, dark)
    light = 1 + between(-0.25, 0.25) * x + between(-0.25, 0.25) * y
    return (np.where(inside[..., None], front, ground) * light[..., None]).astype(np.float32)


def _gray(d: Iterator[Array], low: float, high: float) -> Array:
    """A brightness in [low, high] with a tint: [b, 1, 1, 3]."""
    tint = np.concatenate([next(d) for _ in range(3)], axis=-1)[:, None] - 0.5
    return (low + (high - low) * next(d)[..., None] + 0.12 * tint).astype(np.float32)
