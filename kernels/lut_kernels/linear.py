"""Linear layers: the library's product, or oneDNN's where the library takes a slow one.

On x86-64 processors that are not Intel's, torch hands fp32 products to MKL, which runs at half the speed of oneDNN there
(AMD Zen 5, one core: about 97 against 215 GFLOP/s, `benchmarks/linear_cpu.json`); both come with torch.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lut_kernels.dispatch import current_mode

_SLOW_MKL = ("AuthenticAMD",)
_SMALLEST = 1 << 22  # multiply-adds: below, a call through an operator of our own costs more than it saves


@cache
def onednn_is_faster() -> bool:
    """Whether this processor's fp32 products should go to oneDNN: where that was measured to be faster."""
    if platform.machine() != "x86_64" or not (
        torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    ):
        return False
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
    return vendor in _SLOW_MKL


def linear_side(device: torch.device | str, dtype: torch.dtype) -> str:
    """`onednn` or `torch`: what `linear` would run. LUT_KERNELS=torch forces the library."""
    on_cpu = torch.device(device).type == "cpu" and dtype == torch.float32
    return "onednn" if on_cpu and current_mode() != "torch" and onednn_is_faster() else "torch"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, as `torch.nn.functional.linear`: [..., K], [N, K], [N] or None -> [..., N]."""
    # Under autocast the library casts; a product of mixed dtypes is the library's too, and so is one that is too small.
    same = x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if same and x.dim() > 1 and x.numel() * len(weight) >= _SMALLEST and linear_side(x.device, x.dtype) == "onednn":
        out: torch.Tensor = torch.ops.lut_kernels.linear(x, weight, bias)
        return out
    return F.linear(x, weight, bias)


@torch.library.custom_op("lut_kernels::linear", mutates_args=(), device_types="cpu")
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, weight.shape[0])
    need_x, need_weight, need_bias = ctx.needs_input_grad
    grad_x = torch.ops.lut_kernels.linear(rows, weight.t(), None).view(x.shape) if need_x else None
    grad_weight = None
    if need_weight:
        grad_weight = torch.ops.lut_kernels.linear(rows.t(), x.reshape(-1, x.shape[-1]).t(), None)
    return grad_x, grad_weight, rows.sum(0) if ctx.has_bias and need_bias else None


_linear.register_autograd(_backward, setup_context=_setup)
