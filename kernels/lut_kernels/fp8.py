"""Linear layers in 8-bit floating point (e4m3) for inference: a scale for every row of activations and of weights.

Micikevicius et al., "FP8 Formats for Deep Learning", 2022. On GPUs the product is the library's (`torch._scaled_mm`, tensor
cores, compute capability 8.9 and later); elsewhere the same 8-bit values are multiplied in fp32, which is exact up to the
order of summation. There is no gradient.
"""

from __future__ import annotations

import torch

from lut_kernels.checks import expect_dtype, expect_shape

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
CAPABILITY = (8, 9)
_SMALLEST = 2.0**-120  # a row of zeros has some scale too


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, K] in e4m3, and their scales, fp32 [M, 1]: x is about rows * scales, the largest value of a row exactly.

    A row with an infinite value or a NaN becomes NaN.
    """
    wide = x.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=_SMALLEST)
    return (wide / scale).to(E4M3), scale


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ (weight * weight_scale).T + bias with x rounded to e4m3 row by row: [..., K] -> [..., N] in the dtype of x.

    x: bf16 or fp32 (on a GPU bf16, in which the product is written); weight: e4m3 [N, K]; weight_scale: fp32 [N, 1]; bias:
    [N] in the dtype of x. Sums are taken in fp32 (by Hopper's tensor cores with fewer bits). Raises TypeError or ValueError.
    """
    expect_dtype("x", x.dtype, (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float32))
    expect_dtype("weight", weight.dtype, (E4M3,))
    expect_shape("weight", weight, (None, x.shape[-1]))
    expect_shape("weight_scale", weight_scale, (len(weight), 1))
    rows, scale = quantise_rows(x.reshape(-1, x.shape[-1]))
    product = _tensor_cores if x.is_cuda else _reference
    return product(rows, scale, weight, weight_scale, bias, x.dtype).view(*x.shape[:-1], len(weight))


def _tensor_cores(
    rows: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch._scaled_mm(rows, weight.t(), scale, weight_scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True)


def _reference(
    rows: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    out = (rows.float() @ weight.float().t()).mul_(scale).mul_(weight_scale.t())
    return (out if bias is None else out.add_(bias.float())).to(dtype)
