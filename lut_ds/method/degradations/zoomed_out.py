"""Zoomed-out: the encoder sees a small view inside its own mirror images, and the small view is to be drawn large."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lut_ds.method.degradations.base import Degradation, register
from lut_ds.method.pixels import area_resize, redrawn, to_image


@register("zoomed_out")
@dataclass(frozen=True)
class ZoomedOut(Degradation):
    """The encoder sees a view of side V padded to S with its mirror image; the prediction is the view, drawn at side S.

    The view lies `left`, `top` pixels from the corner, each uniform in [0, S - V). Prediction and target patches are taken at
    side S, shrunk to V and padded as the input was; the squared error counts at the padded input's patches, with masking at
    the hidden ones. At S = 224: V = 160. The published code cannot run without masking; all patches then count here.

    Attributes:
        view: V as a fraction of S (rounded to pixels), at least a half.
    """

    loss_on: str = "hidden"
    view: float = 5 / 7
    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 <= self.view < 1:
            raise ValueError(f"view: expected at least 0.5 and below 1, found {self.view}")

    def view_side(self, side: int) -> int:
        """V."""
        pixels = round(side * self.view)
        if pixels >= side or 2 * pixels < side:
            raise ValueError(
                f"view: {self.view} of {side} pixels is {pixels}; expected at least half and fewer than all"
            )
        return pixels

    def degrade(self, view: Tensor, draws: Tensor, side: int) -> Tensor:
        """The view and its mirror images around it."""
        return mirror_pad(view, *_sources(draws, view.shape[2], side))

    def loss(
        self, pred: Tensor, view: Tensor, counted: Tensor, draws: Tensor, patch_size: int, norm_pix: bool
    ) -> Tensor:
        """The error is taken once for each pixel of the view, times how often it counts in the padded image."""
        small = view.shape[2]
        image = to_image(pred.float(), patch_size)
        error = (area_resize(image, small) - redrawn(view, image.shape[2], patch_size, norm_pix)).square()
        if self.loss_on == "all":
            counted = torch.ones_like(counted)
        weights = pixel_weights(counted, patch_size, small, *_sources(draws, small, image.shape[2]))
        return (error * weights[:, None]).sum() / (3 * patch_size**2 * counted.sum())


def _sources(draws: Tensor, small: int, side: int) -> tuple[Tensor, Tensor]:
    """Source rows and columns of the padded image, int64 [B, S] each, from draws (left, top)."""
    left, top = (draws * (side - small)).floor().long().unbind(1)
    return mirror_sources(top, small, side), mirror_sources(left, small, side)


def mirror_sources(offset: Tensor, small: int, side: int) -> Tensor:
    """Source index of each of `side` padded positions: [B] offsets -> int64 [B, side]; the edge pixel repeats."""
    position = torch.arange(side, device=offset.device) - offset[:, None]
    position = torch.where(position < 0, -1 - position, position)
    return torch.where(position >= small, 2 * small - 1 - position, position)


def mirror_pad(view: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, C, V, V] -> [B, C, S, S] by source rows and columns, int64 [B, S]."""
    batch, channels, small, _ = view.shape
    side = rows.shape[1]
    tall = view.gather(2, rows[:, None, :, None].expand(batch, channels, side, small))
    return tall.gather(3, columns[:, None, None].expand(batch, channels, side, side))


def pixel_weights(counted: Tensor, patch_size: int, small: int, rows: Tensor, columns: Tensor) -> Tensor:
    """How often each pixel of the view counts in the padded image: patch weights [B, L] -> [B, V, V].

    The transpose of `mirror_pad`, as matrix products: nothing is scattered, so it repeats to the bit, and the padded
    prediction and target are never stored.
    """
    grid = rows.shape[1] // patch_size
    pixels = counted.view(-1, grid, grid).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    source = torch.arange(small, device=rows.device)
    down, across = ((index[:, :, None] == source).to(counted.dtype) for index in (rows, columns))
    return down.transpose(1, 2) @ pixels @ across
