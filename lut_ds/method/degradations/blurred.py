"""Blurred: every image through its own random 7x7 kernel, to be sharpened."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lut_ds.method.degradations.base import Degradation, register

SIDE = 7
_TINY = 2.0**-25


@register("blurred")
@dataclass(frozen=True)
class Blurred(Degradation):
    """The encoder sees the view convolved with random kernels; the target is the sharp view, at all patches.

    Our reading of the paper. The published code has a 1x1 convolution to seven channels with a padding of 3 and weights
    N(1/49, spread), whose output no encoder there takes; 49 and the padding say that 7x7 was meant. So here: one 7x7
    kernel for each channel of each image, weights N(1/49, spread), zeros outside, no bias.
    """

    spread: float = 0.02
    draws: ClassVar[int] = 3 * SIDE**2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread: expected at least 0 and at most 1, found {self.spread}")

    def degrade(self, view: Tensor, draws: Tensor, side: int) -> Tensor:
        """The view through kernels of normal weights, by the inverse of their distribution at the draws."""
        # A draw may be 0, and has 24 bits: both ends stay finite.
        normal = torch.special.ndtri(draws.clamp(_TINY, 1 - 2 * _TINY))
        return convolve_each(view, (1 / SIDE**2 + self.spread * normal).view(-1, 3, SIDE, SIDE))


def convolve_each(view: Tensor, kernels: Tensor) -> Tensor:
    """Each channel of each image [B, 3, S, S] with its own kernel [B, 3, k, k], k odd; zeros outside, the same size."""
    batch, channels, size = kernels.shape[:3]
    planes = F.conv2d(
        view.reshape(1, batch * channels, *view.shape[2:]),
        kernels.reshape(batch * channels, 1, size, size),
        padding=size // 2,
        groups=batch * channels,
    )
    return planes.view_as(view)
