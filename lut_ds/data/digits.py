"""A data set that needs no download: scikit-learn's handwritten digits, written once as a folder of JPEGs."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from lut_ds.errors import UserError

_MANIFEST = "digits.json"
_QUALITY = 95
_VAL_EVERY = 5  # within a class, every fifth image is held out


def write_digits(path: Path, size: int = 32) -> Path:
    """Write the 1,797 digits (8x8) as RGB JPEGs of side `size` to path/{train,val}/<digit>/*.jpg, about 80/20; returns `path`.

    Written aside and renamed; a folder that is already complete at that size is left alone, one of ours that is not is written
    again. UserError when `path` holds something else.
    """
    path = Path(path)
    if _complete(path, size):
        return path
    if path.exists() and not (path / _MANIFEST).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"digits: {path}: expected an empty or missing folder, found other files; give another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        aside.chmod(0o755)  # mkdtemp makes it private
        _write(aside, size)
        _put_in_place(aside, path, size)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def _write(folder: Path, size: int) -> None:
    from sklearn.datasets import load_digits  # slow to import, and only needed the first time

    images, targets = load_digits(return_X_y=True)
    seen = [0] * 10
    files: dict[str, int] = {}
    for pixels, digit in zip(images.reshape(-1, 8, 8), targets.tolist()):
        split = "val" if seen[digit] % _VAL_EVERY == _VAL_EVERY - 1 else "train"
        name = f"{split}/{digit}/{seen[digit]:03d}.jpg"
        seen[digit] += 1
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        gray = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        gray.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(folder / name, quality=_QUALITY)
        files[name] = (folder / name).stat().st_size
    (folder / _MANIFEST).write_text(json.dumps({"size": size, "files": files}))


def _complete(path: Path, size: int) -> bool:
    """Whether `path` has every file of its manifest, with its length, at this image side."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        return manifest["size"] == size and all((path / f).stat().st_size == n for f, n in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _put_in_place(aside: Path, path: Path, size: int) -> None:
    """Rename, replacing a broken set of ours; another process that was faster is as good."""
    if (path / _MANIFEST).is_file() and not _complete(path, size):
        shutil.rmtree(path)
    try:
        os.rename(aside, path)
    except OSError:
        if not _complete(path, size):
            raise
