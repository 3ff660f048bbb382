"""A data set that needs no download: scikit-learn's handwritten digits, written once as a folder of JPEGs."""

from pathlib import Path

import numpy as np
from PIL import Image

from lut_ds.data.generated import write_set

_QUALITY = 95
_VAL_EVERY = 5  # within a class, every fifth image is held out


def write_digits(path: Path, size: int = 32) -> Path:
    """Write the 1,797 digits (8x8) as RGB JPEGs of side `size` to path/{train,val}/<digit>/*.jpg, about 80/20; returns `path`.

    A folder that is already complete at that size is left alone; see `generated.write_set`. UserError when `path` holds
    something else.
    """
    return write_set(path, "digits", {"size": size}, lambda folder: _write(folder, size))


def _write(folder: Path, size: int) -> list[str]:
    from sklearn.datasets import load_digits  # slow to import, and only needed the first time

    images, targets = load_digits(return_X_y=True)
    seen = [0] * 10
    files = []
    for pixels, digit in zip(images.reshape(-1, 8, 8), targets.tolist()):
        split = "val" if seen[digit] % _VAL_EVERY == _VAL_EVERY - 1 else "train"
        files.append(f"{split}/{digit}/{seen[digit]:03d}.jpg")
        seen[digit] += 1
        (folder / files[-1]).parent.mkdir(parents=True, exist_ok=True)
        gray = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        gray.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(folder / files[-1], quality=_QUALITY)
    return files
