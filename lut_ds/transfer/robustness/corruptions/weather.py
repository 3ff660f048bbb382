"""Weather: snow, frost, fog, brightness.

Fog and brightness are equal to the published ones, in distribution and exactly. Snow's streaks are drawn by our own motion
blur. Frost, which the published code crops from six photographs, is a texture computed here: feathers of ice along a few
directions over a fractal ground. It has the published strengths, but not the photographs' look; numbers differ.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from lut_ds.transfer.robustness.corruptions.blur import along_line
from lut_ds.transfer.robustness.corruptions.level import Level, Pixels
from lut_ds.transfer.robustness.corruptions.resample import along_both, zoom_matrix

TEXTURES = 5
_ICE = np.array([0.82, 0.93, 1.0], np.float32)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def snow(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Flakes that fall in streaks, in front of a whitened scene."""
    mean, deviation, zoom, threshold, radius, sigma, kept = level.of(
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    )
    flakes = np.float32(mean) + np.float32(deviation) * rng.standard_normal(x.shape[:2], np.float32)
    flakes = along_both(zoom_matrix(level.side, max(1.0, level.px(zoom))), flakes)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1)).astype(np.float32)
    layer = along_line(flakes, level.px(radius), level.px(sigma), rng.uniform(-135, -45))[..., None]
    white = np.maximum(x, (x @ _LUMA)[..., None] * 1.5 + 0.5)
    return kept * x + (1 - kept) * white + layer + np.rot90(layer, k=2)


def frost(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Ice on the lens: a random window of a computed texture, added to the dimmed image."""
    image, ice = level.of(
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    )
    texture = frost_texture(level.side, int(rng.integers(TEXTURES)))
    top, left = rng.integers(0, len(texture) - level.side, 2)
    return np.float32(image) * x + np.float32(ice) * texture[top : top + level.side, left : left + level.side]


@functools.lru_cache(maxsize=2 * TEXTURES)
def frost_texture(side: int, index: int) -> Pixels:
    """Texture `index` of TEXTURES for images of `side` pixels: float32 [2 * side, 2 * side, 3] in [0, 1]."""
    rng = np.random.default_rng([20190326, index])
    ground = plasma(2 * side, 1.8, rng).astype(np.float32)
    ice = 0.25 + 0.35 * ground
    first = rng.uniform(0, 180)
    for branch in range(6):  # six-fold, as crystals grow, bent a little
        seeds = (rng.random(ground.shape) < 0.004 + 0.008 * ground).astype(np.float32)
        length = side / 7 * rng.uniform(0.6, 1.6)
        feather = along_line(seeds, length / 2, length / 2, first + 60 * branch + rng.uniform(-8, 8))
        ice += 2.2 * feather
    return np.clip(ice, 0, 1)[..., None] * _ICE


def fog(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """A fractal cloud added, and the range kept."""
    thickness, decay = level.of(
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)), ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))
    )
    cloud = plasma(level.side, decay, rng).astype(np.float32)
    brightest = x.max()
    return (x + thickness * cloud[..., None]) * (brightest / (brightest + thickness))


def plasma(side: int, decay: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A diamond-square height map on a torus, cut to [side, side], in [0, 1]; detail shrinks by `decay` at each halving."""
    size = 1 << (side - 1).bit_length()
    grid = np.zeros((size, size))
    step, roughness = size, 100.0

    def jitter(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return sums / 4 + roughness * rng.uniform(-roughness, roughness, sums.shape)

    while step > 1:
        half = step // 2
        corners = grid[::step, ::step]
        across, down = corners + np.roll(corners, -1, axis=1), corners + np.roll(corners, -1, axis=0)
        grid[half::step, half::step] = centres = jitter(across + np.roll(across, -1, axis=0))
        grid[::step, half::step] = jitter(across + centres + np.roll(centres, 1, axis=0))
        grid[half::step, ::step] = jitter(down + centres + np.roll(centres, 1, axis=1))
        step, roughness = half, roughness / decay
    grid -= grid.min()
    return (grid / grid.max())[:side, :side]


def brightness(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """HSV value raised; hue and saturation stay."""
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + level.of((0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)), 1)
    return np.where(value > 0, x * (raised / np.maximum(value, 1e-6)), raised).astype(np.float32)
