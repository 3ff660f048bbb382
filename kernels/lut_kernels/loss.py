"""Reconstruction loss over the hidden patches; the target is built from the pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lut_kernels.checks import FLOATS, expect_device, expect_dtype, expect_shape
from lut_kernels.pixels import affine, check_ids, check_pixels, normalised_rows

EPS = 1e-6


def _reference(
    pred: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    norm_pix: bool,
) -> torch.Tensor:
    wide = torch.promote_types(pred.dtype, torch.float32)
    with torch.no_grad():
        target = normalised_rows(pixels, ids, patch_size, scale, shift).to(wide)
        if norm_pix:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=1)
            target = (target - mean) * (var + EPS).rsqrt()
    return torch.nn.functional.mse_loss(pred.to(wide), target).float()


def reconstruction_loss(
    pred: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm_pix: bool = True,
) -> torch.Tensor:
    """fp32 scalar: the mean over B and M of each hidden patch's mean squared error (the loss of MAE and of LUT).

    pred: float [B, M, P*P*3]; pixels, patch_size, mean, std: as for `gather_patches`; ids: int64 [B, M], the patches
    predicted. norm_pix: the target of a patch is (row - its mean) / sqrt(its unbiased variance + 1e-6), over all its
    P*P*3 values, in fp32; else the row itself.
    The gradient flows to pred only. Raises ValueError or TypeError naming the argument at fault.
    """
    batch, _ = check_pixels(pixels, patch_size)
    check_ids(ids, batch, pixels)
    expect_dtype("pred", pred.dtype, FLOATS)
    expect_shape("pred", pred, (batch, ids.shape[1], patch_size * patch_size * 3))
    expect_device("pred", pred, "pixels", pixels)
    scale, shift = affine(pixels, mean, std)
    return _reference(pred, pixels, ids, patch_size, scale, shift, norm_pix)
