"""The corruptions of ImageNet-C, computed: 15 that are measured and 4 extra, at severities 1 to 5.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019, with
the constants of its published code: ImageNet-C's for photographs, CIFAR-10-C's for small images; lengths are scaled to other
sides. Pixels are not those of the published files: the random numbers differ, and frost (no photographs), snow, motion blur,
elastic deformation and spatter (other libraries) differ besides; each file says how.
"""

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from lut_ds.transfer.robustness.corruptions import blur, digital, noise, spatter, weather
from lut_ds.transfer.robustness.corruptions.level import Level, Pixels

Corruption = Callable[[Pixels, Level, np.random.Generator], Pixels]

MEASURED: dict[str, Corruption] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
EXTRA: dict[str, Corruption] = {
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter.spatter,
    "saturate": digital.saturate,
}
CORRUPTIONS = {**MEASURED, **EXTRA}
SEVERITIES = (1, 2, 3, 4, 5)
_QUALITY = 85  # of the JPEG files of ImageNet-C; CIFAR-10-C is not compressed


def corrupt(
    pixels: NDArray[np.uint8], name: str, severity: int, seed: int = 0, sample: int = 0, compress: bool = True
) -> NDArray[np.uint8]:
    """One corrupted image, a pure function of its arguments.

    Args:
        pixels: uint8 [S, S, 3].
        name: key of CORRUPTIONS.
        severity: 1 to 5.
        seed, sample: of the random numbers; severities share them.
        compress: photographs pass through JPEG at quality 85, as in the published set.

    Returns:
        uint8 [S, S, 3].
    """
    level = Level(severity, len(pixels))
    rng = np.random.default_rng([seed, sample, zlib.crc32(name.encode())])
    found = CORRUPTIONS[name](pixels.astype(np.float32) / np.float32(255), level, rng)
    # Cut off, not rounded, as published; a millionth keeps whole values whole.
    whole = np.floor(np.clip(found, 0, 1) * 255 + 1e-4).astype(np.uint8)
    if compress and level.photo:
        return np.rint(digital.jpeg(whole.astype(np.float32) / np.float32(255), _QUALITY) * 255).astype(np.uint8)
    return whole


def corrupt_batch(
    pixels: NDArray[np.uint8], name: str, severity: int, seed: int, samples: Sequence[int], workers: Executor
) -> NDArray[np.uint8]:
    """`corrupt` for images uint8 [b, S, S, 3], each by its number of `samples`; numpy, scipy and PIL leave the lock of Python."""
    return np.stack(
        list(workers.map(lambda pair: corrupt(pair[0], name, severity, seed, pair[1]), zip(pixels, samples)))
    )
