"""The two pixel layouts, their checks, and the per-channel affine map that stands for normalisation."""

# mypy: disable-error-code=no-untyped-def
# (a jitted kernel has Triton's types, not Python's)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lut_kernels.checks import FLOATS, expect_device, expect_dtype, expect_indices, expect_shape


def check_pixels(pixels: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """Return (B, g) of pixels uint8 [B, S, S, 3] or float [B, 3, S, S], where g = S / P patches a side."""
    if pixels.dtype == torch.uint8:
        expect_shape("pixels", pixels, (None, None, None, 3))
        height, width = pixels.shape[1], pixels.shape[2]
    else:
        expect_dtype("pixels", pixels.dtype, (torch.uint8, *FLOATS))
        expect_shape("pixels", pixels, (None, 3, None, None))
        height, width = pixels.shape[2], pixels.shape[3]
    if height != width or patch_size < 1 or height % patch_size != 0:
        raise ValueError(f"pixels: expected a square side divisible by patch_size {patch_size}, found {height}x{width}")
    return pixels.shape[0], height // patch_size


def check_ids(ids: torch.Tensor, batch: int, patches: int, pixels: torch.Tensor) -> None:
    """Check patch indices int64 [B, K] against the batch and the number of patches they index."""
    expect_dtype("ids", ids.dtype, (torch.int64,))
    expect_shape("ids", ids, (batch, None))
    expect_device("ids", ids, "pixels", pixels)
    expect_indices("ids", ids, patches)


def affine(
    pixels: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """(scale, shift), three values each, with (v/255 - mean)/std = v*scale + shift for uint8 pixels.

    mean and std default to 0 and 1. Float pixels are normalised already: both must be None; the map is the identity.
    """
    if pixels.dtype != torch.uint8:
        if mean is not None or std is not None:
            name = "mean" if mean is not None else "std"
            raise ValueError(f"{name}: expected None, float pixels are taken as normalised; found {mean or std}")
        return [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
    mean = [0.0, 0.0, 0.0] if mean is None else [float(value) for value in mean]
    std = [1.0, 1.0, 1.0] if std is None else [float(value) for value in std]
    if len(mean) != 3:
        raise ValueError(f"mean: expected 3 values, found {len(mean)}")
    if len(std) != 3 or min(std) <= 0:
        raise ValueError(f"std: expected 3 positive values, found {std}")
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std)]


@triton.jit
def load_rows(
    pixels,
    ids,
    image,
    image_stride,
    rows,
    kept,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    SIDE: tl.constexpr,
    PATCH: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HWC: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Normalised patch rows [T, BLOCK] of one image: zeros past the row's end, NaN for an id out of range."""
    GRID: tl.constexpr = SIDE // PATCH
    live = rows < kept
    if HAS_IDS:
        patch = tl.load(ids + image * kept + rows, mask=live, other=0)
    else:
        patch = tl.where(live, rows, 0).to(tl.int64)
    known = (patch >= 0) & (patch < GRID * GRID)
    patch = tl.where(known, patch, 0).to(tl.int32)
    top = patch // GRID * PATCH
    left = patch % GRID * PATCH
    value = tl.arange(0, BLOCK)
    row = value // (3 * PATCH)
    mask = live[:, None] & (value < 3 * PATCH * PATCH)[None, :]
    if HWC:
        # A patch line is 3P consecutive bytes: for P = 16 three 16-byte loads.
        corner = (top * SIDE + left) * 3
        inner = row * (3 * SIDE) + value % (3 * PATCH)
    else:
        corner = top * SIDE + left
        inner = value % 3 * (SIDE * SIDE) + row * SIDE + value % (3 * PATCH) // 3
    found = tl.load(pixels + image * image_stride + corner[:, None] + inner[None, :], mask=mask, other=0).to(ACC)
    if HWC:
        channel = value % 3
        scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
        shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
        found = found * scale[None, :] + shift[None, :]
    found = tl.where(mask, found, 0.0)
    return tl.where(known[:, None], found, float("nan"))


def patch_rows(pixels: torch.Tensor, ids: torch.Tensor | None, patch_size: int) -> torch.Tensor:
    """Patches in the pixels' own dtype, contiguous [B, K, P, P, 3]; only the wanted ones are read."""
    batch, grid = check_pixels(pixels, patch_size)
    if pixels.dtype == torch.uint8:
        patches = pixels.unflatten(1, (grid, patch_size)).unflatten(3, (grid, patch_size)).transpose(2, 3)
    else:
        patches = pixels.unflatten(2, (grid, patch_size)).unflatten(4, (grid, patch_size)).permute(0, 2, 4, 3, 5, 1)
    if ids is None:
        return patches.reshape(batch, grid * grid, patch_size, patch_size, 3)
    images = torch.arange(batch, device=pixels.device)[:, None]
    return patches[images, ids // grid, ids % grid].contiguous()


def normalised_rows(
    pixels: torch.Tensor, ids: torch.Tensor | None, patch_size: int, scale: list[float], shift: list[float]
) -> torch.Tensor:
    """Normalised patch rows [B, K, P*P*3]: fp32 for uint8 pixels; float pixels pass as they are, in their dtype."""
    rows = patch_rows(pixels, ids, patch_size).flatten(2)
    if pixels.dtype == torch.uint8:
        rows = rows.float()  # a fresh tensor, so that the map can run in place
        # whole rows of factors: broadcasting over a last dimension of 3 is seven times slower on a CPU
        rows.mul_(_line(scale, rows).repeat(patch_size**2)).add_(_line(shift, rows).repeat(patch_size**2))
    return rows


def _line(values: list[float], like: torch.Tensor) -> torch.Tensor:
    """The values as a tensor, filled in where `like` is: for a copy to a GPU the host would wait."""
    return torch.cat([like.new_full((1,), value) for value in values])
