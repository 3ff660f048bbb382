"""Digital: contrast, elastic deformation, pixelation, JPEG, and the extra saturation.

All but the elastic deformation, whose interpolation is scipy's and not OpenCV's, are the published ones exactly.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import affine_transform, map_coordinates

from lut_ds.transfer.robustness.corruptions.level import Level, Pixels
from lut_ds.transfer.robustness.corruptions.resample import along_both, blur_matrix


def contrast(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Drawn towards the mean of each channel."""
    means = x.mean(axis=(0, 1), keepdims=True)
    return (x - means) * np.float32(level.of((0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15))) + means


def saturate(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """HSV saturation scaled and shifted; grey, which has no hue, turns red where it is shifted."""
    scale, shift = level.of(
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)), ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))
    )
    value = x.max(axis=2, keepdims=True)
    range_ = value - x.min(axis=2, keepdims=True)
    saturation = np.divide(range_, value, out=np.zeros_like(value), where=value > 0)
    wanted = np.clip(saturation * scale + shift, 0, 1)
    coloured = value - (value - x) * wanted / np.maximum(saturation, 1e-6)
    red = value * np.concatenate([np.ones_like(wanted), 1 - wanted, 1 - wanted], axis=2)
    return np.where(range_ > 0, coloured, red).astype(np.float32)


def elastic_transform(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """A random affine map, then smooth random displacements."""
    amount, smoothness, jitter = (
        level.px(length)
        for length in level.of(
            # The published code has 244 where the images have 224 pixels.
            (
                (244 * 2, 244 * 0.7, 244 * 0.1),
                (244 * 2, 244 * 0.08, 244 * 0.2),
                (244 * 0.05, 244 * 0.01, 244 * 0.02),
                (244 * 0.07, 244 * 0.01, 244 * 0.02),
                (244 * 0.12, 244 * 0.01, 244 * 0.02),
            ),
            (
                (0, 0, 32 * 0.08),
                (32 * 0.05, 32 * 0.2, 32 * 0.07),
                (32 * 0.08, 32 * 0.06, 32 * 0.06),
                (32 * 0.1, 32 * 0.04, 32 * 0.05),
                (32 * 0.1, 32 * 0.03, 32 * 0.03),
            ),
        )
    )
    side = level.side
    matrix, offset = _random_affine(side, jitter, rng)
    soft = blur_matrix(side, smoothness, "reflect", 3.0)
    noise = rng.uniform(-1, 1, (2, side, side)).astype(np.float32)
    rows, columns = (along_both(soft, n) * np.float32(amount) for n in noise)
    at = np.mgrid[0:side, 0:side] + np.stack([rows, columns])
    channels = []
    for channel in np.moveaxis(x, 2, 0):
        turned = affine_transform(channel, matrix, offset, order=1, mode="mirror")
        channels.append(map_coordinates(turned, at, order=1, mode="reflect"))
    return np.stack(channels, axis=2)


def _random_affine(
    side: int, jitter: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The map from output to input (row, column) that undoes the move of three corners by up to `jitter` pixels."""
    centre, reach = side // 2, side // 3
    corners = np.array([[centre + reach] * 2, [centre - reach, centre + reach], [centre - reach] * 2], float)
    moved = corners + rng.uniform(-jitter, jitter, corners.shape)
    solution = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)
    return solution[:2].T, solution[2]


def pixelate(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Made smaller and larger again with box filters."""
    share = level.of((0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65))
    small = (int(level.side * share),) * 2
    box = Image.Resampling.BOX
    return _pixels(_image(x).resize(small, box).resize((level.side,) * 2, box))


def jpeg_compression(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """JPEG at low quality."""
    return jpeg(x, level.of((25, 18, 15, 10, 7), (80, 65, 58, 50, 40)))


def jpeg(x: Pixels, quality: int) -> Pixels:
    """The image after JPEG at `quality`."""
    file = io.BytesIO()
    _image(x).save(file, "JPEG", quality=quality)
    return _pixels(Image.open(file))


def _image(x: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(x * 255).astype(np.uint8))


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, np.float32) / np.float32(255)
