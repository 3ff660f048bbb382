"""Random erasing (Zhong et al., AAAI 2020) as timm's mode `pixel`: a rectangle becomes normal noise, after normalisation."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lut_ds.data.rng import STREAM_ERASING, uniforms

_TRIES = 10
_AREA = (0.02, 1 / 3)
_LOG_ASPECT = float(np.log(0.3))  # the ratio is between 0.3 and 1 / 0.3, uniform in its logarithm


@dataclass(frozen=True)
class Erasure:
    """`noise` float32 [3, h, w] replaces the pixels of image `index` of a batch from row `top` and column `left`."""

    index: int
    top: int
    left: int
    noise: Tensor


def draw_erasures(prob: float, image_size: int, seed: int, epoch: int, samples: NDArray[np.int64]) -> list[Erasure]:
    """The erasures of int64 `samples` [n] at side `image_size`, at most one an image; a function of the arguments alone."""
    u = uniforms(seed, epoch, samples, STREAM_ERASING, 3 + 2 * _TRIES)
    area = (_AREA[0] + u[:, 3::2] * (_AREA[1] - _AREA[0])) * image_size**2
    aspect = np.exp((1 - 2 * u[:, 4::2]) * _LOG_ASPECT)
    heights, widths = np.round(np.sqrt(area * aspect)).astype(int), np.round(np.sqrt(area / aspect)).astype(int)
    found = []
    for i in np.flatnonzero(u[:, 0] < prob).tolist():
        fits = np.flatnonzero((heights[i] < image_size) & (widths[i] < image_size))
        if len(fits):
            h, w = int(heights[i, fits[0]]), int(widths[i, fits[0]])
            top, left = int(u[i, 1] * (image_size - h + 1)), int(u[i, 2] * (image_size - w + 1))
            random = np.random.Generator(
                np.random.Philox(key=[seed, STREAM_ERASING], counter=[0, 0, epoch, samples[i]])
            )
            found.append(Erasure(i, top, left, torch.from_numpy(random.standard_normal((3, h, w), np.float32))))
    return found


def erase_(images: Tensor, erasures: list[Erasure]) -> None:
    """Write the noise into normalised images float [B, 3, S, S], in place."""
    if not erasures:
        return
    noise = torch.cat([e.noise.flatten() for e in erasures])
    if images.device.type == "cuda":
        noise = noise.pin_memory()  # from pageable memory the copy would wait for everything queued on the device
    noise = noise.to(images.device, images.dtype, non_blocking=True)
    for e, part in zip(erasures, noise.split([e.noise.numel() for e in erasures]), strict=True):
        _, h, w = e.noise.shape
        images[e.index, :, e.top : e.top + h, e.left : e.left + w] = part.view(3, h, w)
