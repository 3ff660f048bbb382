"""Blur: defocus, glass, motion, zoom, and the extra Gaussian.

Motion blur follows ImageMagick's half-Gaussian line with whole-pixel steps, and is not claimed to be pixel-exact; glass blur
is the published loop over pixels, as that loop really behaves, in logarithmic time.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve1d
from scipy.signal import fftconvolve

from lut_ds.transfer.robustness.corruptions.level import Level, Pixels
from lut_ds.transfer.robustness.corruptions.resample import along_both, blur_matrix, zoom_matrix


def gaussian_blur(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """A Gaussian kernel."""
    sigma = level.px(level.of((1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)))
    return along_both(blur_matrix(level.side, sigma), x)


def defocus_blur(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """A disk whose edge is softened."""
    radius, soft = level.of(
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)), ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    )
    kernel = _disk(level.px(radius), soft)
    margin = len(kernel) // 2
    padded = np.pad(x, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    return fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1)).astype(np.float32)


def _disk(radius: float, soft: float) -> NDArray[np.float32]:
    reach = 8 if radius <= 8 else int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float32)
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    gaussian = np.exp(-(taps**2) / (2 * soft**2))
    gaussian /= gaussian.sum()
    for axis in (0, 1):
        disk = convolve1d(disk, gaussian, axis=axis, mode="mirror")
    return disk / disk.sum()


def glass_blur(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Blur, move pixels about within `reach`, blur."""
    sigma, reach, rounds = level.of(
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    )
    side, reach = level.side, max(1, round(level.px(reach)))
    soft = blur_matrix(side, level.px(sigma))
    flat = np.floor(along_both(soft, x).reshape(-1, 3) * 255).astype(np.float32)
    span = side - 2 * reach
    for _ in range(rounds if span > 0 else 0):
        flat = flat[moved(side, reach, rng.integers(-reach, reach, (span, span, 2)))]
    return along_both(soft, flat.reshape(x.shape) / np.float32(255))


def moved(side: int, reach: int, shifts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each pixel's value comes from after one round: raster indices, int64 [side*side].

    The published code visits pixels from the last to the first and exchanges each with a neighbour (dx, dy in -reach..reach-1).
    Its exchange is between views of one array, so the neighbour's value is copied and nothing moves the other way. A
    neighbour that was visited before passes on what it had copied: the chains are followed by pointer doubling.

    Args:
        shifts: (dx, dy) in the order of the visits, int64 [n, n, 2] with n = side - 2 * reach.
    """
    visited = np.arange(side - reach, reach, -1)
    dx, dy = shifts[..., 0], shifts[..., 1]
    rows, columns = visited[:, None] + dy, visited[None, :] + dx
    here = visited[:, None] * side + visited[None, :]
    source = np.arange(side * side)
    source[here] = rows * side + columns
    inside = np.zeros((side, side), bool)
    inside[reach + 1 : side - reach + 1, reach + 1 : side - reach + 1] = True
    own = np.arange(side * side)
    follows = (source > own) & inside.reshape(-1)[source] & inside.reshape(-1)
    while follows.any():  # `source` of a follower is another pixel that copied; the others' is an original
        target = source[follows]
        source[follows], follows[follows] = source[target], follows[target]
    return source


def motion_blur(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Along a line within 45 degrees of the horizontal."""
    radius, sigma = level.of(
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
    )
    return along_line(x, level.px(radius), level.px(sigma), rng.uniform(-45, 45))


def along_line(image: NDArray[np.float32], radius: float, sigma: float, angle: float) -> NDArray[np.float32]:
    """Half a Gaussian over 2 * ceil(radius) + 1 pixels of a line at `angle` degrees; the border is repeated."""
    steps = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    direction = np.deg2rad(angle)
    rows = np.ceil(steps * np.sin(direction) - 0.5).astype(int)
    columns = np.ceil(steps * np.cos(direction) - 0.5).astype(int)
    margin = int(max(abs(rows).max(), abs(columns).max()))
    height, width = image.shape[:2]
    padded = np.pad(image, [(margin, margin)] * 2 + [(0, 0)] * (image.ndim - 2), mode="edge")
    blurred = np.zeros_like(image)
    for weight, row, column in zip(weights.astype(np.float32), rows + margin, columns + margin, strict=True):
        if weight > 1e-6:
            blurred += weight * padded[row : row + height, column : column + width]
    return blurred


def zoom_blur(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """The mean of the image and of enlargements of it."""
    last, step = level.of(
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    )
    factors = np.arange(1, last, step)
    total = x.copy()
    for factor in factors:
        total += along_both(zoom_matrix(level.side, float(factor)), x)
    return total / np.float32(len(factors) + 1)
