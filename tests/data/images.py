"""Images and small folders for the tests of this room, and DALI run on arrays."""

import io
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lut_ds.data.dali import fn as dali_fn
from lut_ds.data.dali import pipeline_def


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth RGB picture with edges and some noise, of any size."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (fx * x + fy * y) + p) for fx, fy, p in rng.uniform(-3, 3, (3, 3))]
    pixels = 128 + 90 * np.stack(waves, axis=2) + rng.normal(0, 6, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.uniform(0, 255, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def write_folder(root: Path, count: int, classes: int = 2, *, height: int = 40, width: int = 52) -> Path:
    """A folder of JPEGs in classes, sizes varying by sample."""
    for i in range(count):
        folder = root / f"class{i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        picture = photo(height + 3 * (i % 5), width + 5 * (i % 7), seed=i)
        (folder / f"{i:04d}.jpg").write_bytes(encode(picture, quality=92))
    return root


def run_operator(operator: Callable[..., Any], image: np.ndarray, *arguments: Any) -> np.ndarray:
    """One DALI graph operator on one HWC image; `arguments` become CPU nodes."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, enable_conditionals=True)
    def graph() -> Any:
        nodes = [dali_fn.external_source(source=repeat([np.asarray(a)])) for a in arguments]
        return operator(dali_fn.external_source(source=repeat([image]), layout="HWC"), *nodes)

    return np.array(graph().run()[0].at(0))


def difference(found: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Mean and largest absolute difference in grey levels of two uint8 arrays of the same shape."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.uint8
    error = np.abs(found.astype(int) - expected.astype(int))
    return float(error.mean()), int(error.max())
