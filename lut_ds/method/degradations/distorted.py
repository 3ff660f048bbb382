"""Distorted: a fish-eye around a random centre, to be undone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lut_ds.method.degradations.base import Degradation, register


@register("distorted")
@dataclass(frozen=True)
class Distorted(Degradation):
    """The encoder sees the view through a fish-eye; the target is the undistorted view, at all patches.

    Each image has its centre (x, y) ~ U(-1, 1)^2 and its magnitude ~ U(magnitude_low, magnitude_high). What lies outside the
    image is 0 after normalisation, the mean colour. With a magnitude a the image folds back beyond 1 / 2a from the centre (half
    sides): at 1 most of what is seen is fold or outside.
    """

    magnitude_low: float = 0.15
    magnitude_high: float = 0.25
    draws: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.magnitude_low <= self.magnitude_high <= 1:
            raise ValueError(
                f"magnitude_low, magnitude_high: expected 0 <= low <= high <= 1, found {self.magnitude_low}, {self.magnitude_high}"
            )

    def degrade(self, view: Tensor, draws: Tensor, side: int) -> Tensor:
        """The view through the fish-eye of draws (x, y, magnitude)."""
        magnitude = self.magnitude_low + (self.magnitude_high - self.magnitude_low) * draws[:, 2]
        grid = fish_eye(2 * draws[:, :2] - 1, magnitude, *view.shape[2:])
        return F.grid_sample(view, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def fish_eye(centre: Tensor, magnitude: Tensor, height: int, width: int) -> Tensor:
    """Where each output pixel is read: g + a*|c - g|*(c - g) for its position g, corners at -1 and 1.

    Args:
        centre: c, float [B, 2] as (x, y).
        magnitude: a, float [B].

    Returns:
        [B, height, width, 2] as (x, y), for `grid_sample` with align_corners.
    """
    y = torch.linspace(-1, 1, height, device=centre.device)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width, device=centre.device).expand(height, width)
    position = torch.stack([x, y], dim=-1)
    offset = centre[:, None, None] - position
    distance = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
    return position + magnitude[:, None, None, None] * distance * offset
