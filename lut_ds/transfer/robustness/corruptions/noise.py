"""Noise: Gaussian, shot, impulse, and the extra speckle. Equal to the published ones in distribution."""

import numpy as np

from lut_ds.transfer.robustness.corruptions.level import Level, Pixels


def gaussian_noise(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Additive, by channel."""
    deviation = level.of((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10))
    return x + np.float32(deviation) * rng.standard_normal(x.shape, np.float32)


def shot_noise(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Poisson, of so many photons at white."""
    photons = level.of((60, 25, 12, 5, 3), (500, 250, 100, 75, 50))
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def impulse_noise(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Salt and pepper, by channel."""
    share = level.of((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07))
    hit = rng.random(x.shape, np.float32) < share
    return np.where(hit, (rng.random(x.shape, np.float32) < 0.5).astype(np.float32), x)


def speckle_noise(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Gaussian in proportion to the brightness."""
    deviation = level.of((0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2))
    return x + x * np.float32(deviation) * rng.standard_normal(x.shape, np.float32)
