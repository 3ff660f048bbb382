"""Photographs to decode where no data set is named: crops of the two that scikit-learn ships, as JPEGs of common size."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

_HEIGHT, _WIDTH, _QUALITY = 375, 500, 90  # about ImageNet's median file: 500x375, 110 kB
_CLASSES = 4


def write_photos(folder: Path, count: int) -> Path:
    """Write `count` JPEGs of 500x375 to folder/train/<class>/*.jpg; returns `folder`. The same files every time."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = np.random.default_rng(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        scale = draw.uniform(1.0, 1.6)
        size = (round(photo.width * scale), round(photo.height * scale))
        left, top = (
            int(draw.integers(0, whole - part + 1)) for whole, part in zip(size, (_WIDTH, _HEIGHT), strict=True)
        )
        crop = photo.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + _WIDTH, top + _HEIGHT))
        target = folder / "train" / f"class{i % _CLASSES}" / f"{i:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        crop.save(target, quality=_QUALITY)
    return folder
