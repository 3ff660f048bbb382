"""Pixels in plain torch: normalisation, patches and back, per-channel targets, and the area resize."""

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_STATISTICS = tuple(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
_EPS = 1e-6


def normalised(view: Tensor) -> Tensor:
    """uint8 [B, V, V, 3], or float [B, 3, V, V] that is normalised already -> float32 [B, 3, V, V]."""
    if view.dtype != torch.uint8:
        return view.float()
    # One channel after the other: a tensor of constants would have to be copied to the device while the host waits.
    scaled = [view[..., c] * (1 / (255 * std)) - mean / std for c, (mean, std) in enumerate(_STATISTICS)]
    return torch.stack(scaled, dim=1)


def unit_range(view: Tensor) -> Tensor:
    """Undo the normalisation: [B, 3, V, V] -> the same in [0, 1]."""
    return torch.stack([view[:, c] * std + mean for c, (mean, std) in enumerate(_STATISTICS)], dim=1)


def to_patches(image: Tensor, patch_size: int) -> Tensor:
    """[B, C, S, S] -> [B, L, P*P*C], raster order, (row, column, channel) inside a patch."""
    grid = image.shape[2] // patch_size
    tiles = image.unflatten(3, (grid, patch_size)).unflatten(2, (grid, patch_size))
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(len(image), grid * grid, -1)


def to_image(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `to_patches` for three channels: [B, L, P*P*3] -> [B, 3, S, S]."""
    grid = round(patches.shape[1] ** 0.5)
    tiles = patches.unflatten(2, (patch_size, patch_size, 3)).unflatten(1, (grid, grid))
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, grid * patch_size, grid * patch_size)


def normalise_patches(image: Tensor, patch_size: int) -> Tensor:
    """Patches [B, L, P*P*3] of `image` [B, 3, S, S], each channel of each by its own statistics: (v - mean) / (sd + 1e-6).

    sd is unbiased, over P*P pixels. (MAE has one mean and variance for the three channels, and takes sqrt(var + 1e-6).)
    """
    rows = to_patches(image, patch_size).unflatten(2, (-1, 3))
    centred = rows - rows.mean(dim=2, keepdim=True)
    # Not torch.std: on a CPU it takes many times as long as the norm.
    sd = torch.linalg.vector_norm(centred, dim=2, keepdim=True) / (rows.shape[2] - 1) ** 0.5
    return (centred / (sd + _EPS)).flatten(2)


def patch_targets(view: Tensor, patch_size: int, norm_pix: bool) -> Tensor:
    """What to predict for the patches of a normalised `view` [B, 3, S, S]: [B, L, P*P*3], float32, of its colours in [0, 1]."""
    unit = unit_range(view)
    return normalise_patches(unit, patch_size) if norm_pix else to_patches(unit, patch_size)


def area_resize(image: Tensor, side: int) -> Tensor:
    """Resize [B, C, V, V] to [B, C, side, side]: pixel i is the mean of inputs floor(i*V/side) .. ceil((i+1)*V/side)-1."""
    if not image.requires_grad:
        return F.interpolate(image, size=(side, side), mode="area")
    # As two matrix products, whose backward repeats to the bit; that of torch's own operator on a GPU does not.
    across = area_matrix(image.shape[2], side, image)
    return across @ image @ across.T


def redrawn(view: Tensor, side: int, patch_size: int, norm_pix: bool) -> Tensor:
    """A normalised view [B, 3, V, V] as its target patches at side S describe it, at V again: what a perfect decoder draws."""
    patches = patch_targets(area_resize(view, side), patch_size, norm_pix)
    return area_resize(to_image(patches, patch_size), view.shape[2])


def area_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """The linear map [new, old] of `area_resize` along one side, in the dtype and on the device of `like`."""
    out = torch.arange(new, device=like.device)[:, None]
    source = torch.arange(old, device=like.device)
    inside = (source >= out * old // new) & (source < ((out + 1) * old + new - 1) // new)
    weights = inside.to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)
