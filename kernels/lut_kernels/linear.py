"""Linear layers: the library's product, or oneDNN's where the library takes a slow one.

On x86-64 processors that are not Intel's, torch hands fp32 products to MKL, which runs at half the speed of oneDNN there
(AMD Zen 5, one core: about 97 against 215 GFLOP/s, `benchmarks/linear_cpu.json`); both come with torch. bf16 products are
oneDNN's either way, but the library fills the result with the bias first and adds to it: a tenth slower than in one.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lut_kernels.dispatch import current_mode

_SLOW_MKL = ("AuthenticAMD",)
_SMALLEST = 1 << 22  # multiply-adds: below, a call through an operator of our own costs more than it saves


def _processor_prefers_onednn(dtype: torch.dtype) -> bool:
    if platform.machine() != "x86_64" or not (
        torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    ):
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
    return vendor in _SLOW_MKL


# Found when this is imported: torch.compile cannot trace the questions.
_FASTER = frozenset(filter(_processor_prefers_onednn, (torch.float32, torch.bfloat16)))


def onednn_is_faster(dtype: torch.dtype) -> bool:
    """Whether this processor's products, fp32 or bf16, should go to oneDNN: where that was measured to be faster."""
    return dtype in _FASTER


def linear_side(device: torch.device | str, dtype: torch.dtype) -> str:
    """`onednn` or `torch`: what `linear` would run. LUT_KERNELS=torch forces the library."""
    on_cpu = torch.device(device).type == "cpu"
    return "onednn" if on_cpu and current_mode() != "torch" and onednn_is_faster(dtype) else "torch"


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


def _library(x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
    return x @ weight.t()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, weight.shape[0])
    need_x, need_weight, need_bias = ctx.needs_input_grad
    # Without a bias the library's bf16 product is as fast, and faster of transposed inputs.
    product = torch.ops.lut_kernels.linear if grad.dtype == torch.float32 else _library
    grad_x = product(rows, weight.t(), None).view(x.shape) if need_x else None
    grad_weight = product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if need_weight else None
    return grad_x, grad_weight, rows.sum(0) if ctx.has_bias and need_bias else None


_linear.register_autograd(_backward, setup_context=_setup)
