"""Masked patch gather: from pixels straight to the normalised rows of the wanted patches."""

# mypy: disable-error-code=no-untyped-def
# (a jitted kernel has Triton's types, not Python's)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lut_kernels.checks import FLOATS, expect_dtype
from lut_kernels.dispatch import choice, tile
from lut_kernels.pixels import affine, check_ids, check_pixels, load_rows, normalised_rows
from lut_kernels.runtime import INTERPRETED, accumulator, batch_strided, launch


@triton.jit
def gather_kernel(
    pixels,
    ids,
    out,
    image_stride,
    kept,
    row_blocks,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: ROWS patches of one image."""
    program = tl.program_id(0)
    image = (program // row_blocks).to(tl.int64)
    rows = program % row_blocks * ROWS + tl.arange(0, ROWS)
    found = load_rows(
        pixels, ids, image, image_stride, rows, kept,
        scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
        SIDE, PATCH, HAS_IDS, HWC, BLOCK, ACC,
    )  # fmt: skip
    value = tl.arange(0, BLOCK)
    WIDTH: tl.constexpr = 3 * PATCH * PATCH
    mask = (rows < kept)[:, None] & (value < WIDTH)[None, :]
    target = out + image * kept * WIDTH + rows[:, None] * WIDTH + value[None, :]
    tl.store(target, found.to(out.dtype.element_ty), mask=mask)


def launch_gather(
    pixels: torch.Tensor,
    ids: torch.Tensor | None,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    batch, grid = check_pixels(pixels, patch_size)
    pixels = batch_strided(pixels)
    kept = grid * grid if ids is None else ids.shape[1]
    out = pixels.new_empty((batch, kept, 3 * patch_size**2), dtype=dtype)
    config = tile("gather_patches", pixels.device, dtype)
    block = triton.next_power_of_2(out.shape[2])
    rows = max(1, config["elements"] // block)
    row_blocks = triton.cdiv(kept, rows)
    if out.numel() == 0:
        return out
    launch(
        gather_kernel, batch * row_blocks, pixels,
        pixels, pixels if ids is None else ids.contiguous(), out, pixels.stride(0), kept, row_blocks,
        *scale, *shift,
        SIDE=grid * patch_size, PATCH=patch_size, HAS_IDS=ids is not None, HWC=pixels.dtype == torch.uint8,
        ROWS=rows, BLOCK=block,
        ACC=accumulator(torch.promote_types(pixels.dtype, dtype)), num_warps=config["warps"],
    )  # fmt: skip
    return out


def _reference(
    pixels: torch.Tensor,
    ids: torch.Tensor | None,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    return normalised_rows(pixels, ids, patch_size, scale, shift).to(dtype)


@torch.library.custom_op("lut_kernels::gather_patches", mutates_args=())
def gather_op(
    pixels: torch.Tensor,
    ids: torch.Tensor | None,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The operator behind `gather_patches`; takes the affine map of the pixels instead of mean and std."""
    if INTERPRETED:
        return launch_gather(pixels, ids, patch_size, scale, shift, dtype)
    return _reference(pixels, ids, patch_size, scale, shift, dtype).clone()  # an op may not return a view of its input


gather_op.register_kernel("cuda")(launch_gather)


@gather_op.register_fake
def _(
    pixels: torch.Tensor,
    ids: torch.Tensor | None,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    batch, grid = check_pixels(pixels, patch_size)
    kept = grid * grid if ids is None else ids.shape[1]
    return pixels.new_empty((batch, kept, 3 * patch_size**2), dtype=dtype)


def gather_patches(
    pixels: torch.Tensor,
    ids: torch.Tensor | None,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows of the patches `ids`, [B, K, P*P*3] in `dtype`; inside a patch the order is (row, column, channel).

    pixels: uint8 [B, S, S, 3], normalised here as (v/255 - mean)/std; or float [B, 3, S, S], taken as normalised.
    ids: int64 [B, K] raster indices into the L = (S/P)^2 patches; None takes all of them in raster order.
    mean, std: three values each for uint8 pixels (default 0 and 1); must be None for float pixels.
    Raises ValueError, TypeError or IndexError naming the argument at fault. The values of ids are looked at on a CPU
    only: on a GPU an id out of range gives a NaN row.
    """
    batch, grid = check_pixels(pixels, patch_size)
    expect_dtype("dtype", dtype, FLOATS)
    if ids is not None:
        check_ids(ids, batch, grid * grid, pixels)
    scale, shift = affine(pixels, mean, std)
    # The kernel has no gradient for pixels: nothing in training asks for one.
    if choice("gather_patches", pixels.device, dtype) == "triton" and not pixels.requires_grad:
        return gather_op(pixels, ids, patch_size, scale, shift, dtype)
    return _reference(pixels, ids, patch_size, scale, shift, dtype)
