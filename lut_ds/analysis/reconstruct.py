"""What the decoder imagines behind the mask: input, masked input, prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lut_kernels import gather_patches
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from lut_ds.analysis.figures import Draw, Theme, axes_grid, new_figure, png, write_aside
from lut_ds.method.lut import MAE, encode_views
from lut_ds.method.pixels import IMAGENET_MEAN, IMAGENET_STD

HIDDEN_GRAY = 128
_EPS = 1e-6  # of the loss's patch normalisation


@dataclass(frozen=True)
class Reconstruction:
    """uint8 [B, S, S, 3] each: the images, what the encoder saw (hidden patches gray), and the prediction in place of them."""

    original: NDArray[np.uint8]
    masked: NDArray[np.uint8]
    predicted: NDArray[np.uint8]


def fixed_noise(images: int, patches: int, seed: int = 0) -> Tensor:
    """Mask noise float32 [B, L] that is the same in every run, so that pictures can be compared."""
    return torch.rand((images, patches), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reconstruct(student: MAE, pixels: Tensor, noise: Tensor) -> Reconstruction:
    """Mask images as view 1 is in training, and predict what was hidden.

    Where the model was trained on patches normalised by their own mean and deviation, its prediction carries neither: both
    are taken from the true patch, as in the figures of MAE (He et al. 2022). So overall brightness and contrast of a
    predicted patch are given, not predicted.

    Args:
        student: encoder and decoder, in eval mode.
        pixels: uint8 [B, S, S, 3].
        noise: float [B, L] mask noise.
    """
    side = student.encoder.patch_embed.patch_size[0]
    masking = student.mask(noise)
    latent = encode_views(student.encoder, [pixels], [masking.ids_keep[0]])
    rows = student.decoder(latent, masking.ids_restore, masking.ids_hidden).float()
    truth = gather_patches(pixels, masking.ids_hidden, side, IMAGENET_MEAN, IMAGENET_STD)
    if student.norm_pix:
        variance, mean = torch.var_mean(truth, dim=-1, keepdim=True)
        rows = rows * (variance + _EPS).sqrt() + mean
    colours = rows.unflatten(-1, (side, side, 3)) * rows.new_tensor(IMAGENET_STD) + rows.new_tensor(IMAGENET_MEAN)
    filled = (colours * 255).round().clamp(0, 255).to(torch.uint8)
    gray = torch.full_like(filled, HIDDEN_GRAY)
    return Reconstruction(
        pixels.numpy(),
        paste_patches(pixels, masking.ids_hidden, gray).numpy(),
        paste_patches(pixels, masking.ids_hidden, filled).numpy(),
    )


def paste_patches(pixels: Tensor, ids: Tensor, patches: Tensor) -> Tensor:
    """A copy of uint8 `pixels` [B, S, S, 3] with `patches` uint8 [B, M, P, P, 3] at the raster indices `ids` int64 [B, M]."""
    batch, size, side = pixels.shape[0], pixels.shape[1], patches.shape[2]
    grid = size // side
    tiles = pixels.view(batch, grid, side, grid, side, 3).transpose(2, 3).flatten(1, 2).clone()
    tiles[torch.arange(batch).unsqueeze(1), ids] = patches
    return tiles.view(batch, grid, grid, side, side, 3).transpose(2, 3).reshape(batch, size, size, 3)


def draw_reconstruction(found: Reconstruction, names: Sequence[str], blocks: int = 1) -> Draw:
    """A panel with a row a sample and the columns input, masked input, prediction.

    Args:
        names: a short name a sample.
        blocks: groups of three columns that share the samples between them.
    """

    def draw(theme: Theme) -> Figure:
        count = len(found.original)
        rows = -(-count // blocks)
        figure = new_figure(1.15 * 3 * blocks + 0.25 * blocks, 1.15 * rows + 0.35)
        axes = axes_grid(figure, rows, 3 * blocks)
        for axis in axes:
            axis.axis("off")
        for index in range(count):
            block, row = divmod(index, rows)
            for column, (title, images) in enumerate(
                (("input", found.original), ("masked", found.masked), ("prediction", found.predicted))
            ):
                axis = axes[row * 3 * blocks + block * 3 + column]
                axis.imshow(images[index], interpolation="nearest", vmin=0, vmax=255)
                if row == 0:
                    axis.set_title(title, loc="center", fontweight="normal", fontsize=9)
                if column == 0:
                    axis.text(
                        -0.08,
                        0.5,
                        names[index],
                        transform=axis.transAxes,
                        ha="right",
                        va="center",
                        fontsize=9,
                        color=theme.ink,
                    )
        return figure

    return draw


def write_reconstruction(path: str | Path, found: Reconstruction, names: Sequence[str], blocks: int = 1) -> Path:
    """The panel as a PNG."""
    return write_aside(Path(path), png(draw_reconstruction(found, names, blocks)))
