"""Masked patch gather: from pixels straight to the normalised rows of the wanted patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lut_kernels.checks import FLOATS, expect_dtype
from lut_kernels.pixels import affine, check_ids, check_pixels, normalised_rows


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
    Raises ValueError or TypeError naming the argument at fault.
    """
    batch, _ = check_pixels(pixels, patch_size)
    expect_dtype("dtype", dtype, FLOATS)
    if ids is not None:
        check_ids(ids, batch, pixels)
    scale, shift = affine(pixels, mean, std)
    return normalised_rows(pixels, ids, patch_size, scale, shift).to(dtype)
