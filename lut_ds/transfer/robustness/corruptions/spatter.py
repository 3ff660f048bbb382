"""Spatter, the extra weather: drops of water, or of mud, on the lens.

OpenCV's edge detector is replaced by thresholds on Sobel's gradient, so that the drops' rims differ in pixels.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve, distance_transform_edt, label, sobel, uniform_filter

from lut_ds.transfer.robustness.corruptions.level import Level, Pixels
from lut_ds.transfer.robustness.corruptions.resample import along_both, blur_matrix

_WATER = np.array([175, 238, 238], np.float32) / np.float32(255)
_MUD = np.array([63, 42, 20], np.float32) / np.float32(255)
_LIGHT = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)  # from above left
_CONNECTED = np.ones((3, 3))


def spatter(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Water at the first severities, mud at the last two."""
    mean, deviation, sigma, threshold, strength, mud = level.of(
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    )
    liquid = np.float32(mean) + np.float32(deviation) * rng.standard_normal(x.shape[:2], np.float32)
    liquid = along_both(blur_matrix(level.side, level.px(sigma)), liquid)
    liquid = np.where(liquid < threshold, 0, liquid)
    if mud:
        cover = along_both(blur_matrix(level.side, level.px(strength)), (liquid > threshold).astype(np.float32))
        cover = np.where(cover < 0.8, 0, cover)[..., None]
        return x * (1 - cover) + cover * _MUD
    shine = np.floor(np.clip(liquid, 0, 1) * 255) * _relief(liquid)
    peak = shine.max()
    light = (strength * shine / max(peak, 1e-6)).astype(np.float32)
    return x + light[..., None] * _WATER


def _relief(liquid: NDArray[np.float32]) -> NDArray[np.float32]:
    """How the drops catch the light: the equalised distance from their edges, lit from one side. float32 [S, S]."""
    distance = distance_transform_edt(~_edges(np.floor(np.clip(liquid, 0, 1) * 255)))
    height = np.floor(uniform_filter(np.minimum(distance, 20).astype(np.float32), 3, mode="mirror"))
    counts = np.bincount(height.astype(int).ravel(), minlength=21).cumsum()
    first = counts[counts > 0][0]
    equal = np.rint((counts - first) / max(counts[-1] - first, 1) * 255).clip(0, 255)
    lit = convolve(equal[height.astype(int)].astype(np.float32), _LIGHT[::-1, ::-1], mode="mirror").clip(0, 255)
    return uniform_filter(np.rint(lit), 3, mode="mirror").astype(np.float32)


def _edges(grey: NDArray[np.float32], weak: float = 50, strong: float = 150) -> NDArray[np.bool_]:
    """Gradients above `weak` that hang together with one above `strong`."""
    gradient = abs(sobel(grey, 0, mode="nearest")) + abs(sobel(grey, 1, mode="nearest"))
    parts, count = label(gradient > weak, _CONNECTED)
    held = np.zeros(count + 1, bool)
    held[np.unique(parts[gradient > strong])] = True
    held[0] = False
    return held[parts]
