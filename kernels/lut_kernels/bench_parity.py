"""Parity of one operator on a device: against float64, with poisoned memory, twice with the same bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lut_kernels.bench_work import Inputs, Work
from lut_kernels.dispatch import kernels_mode
from lut_kernels.guard import FILLS, guarded_launches

# Allowed error relative to the largest expected value, in units of the dtype's rounding step
STEPS = {"attention": 8.0, "reconstruction_loss": 8.0}
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def poison(device: str) -> None:
    """Fill free memory of the allocator with NaN: an element that a kernel forgets to write is then seen."""
    blocks = [torch.full((size,), float("nan"), device=device) for size in (2**10, 2**16, 2**20, 2**24)]
    del blocks


def outputs(work: Work, inputs: Inputs, mode: str, upstream: Tensor | None) -> list[Tensor]:
    """Output and gradients of the leaves with one side forced."""
    inputs = {name: value.detach().requires_grad_() if name in work.leaves else value for name, value in inputs.items()}
    with kernels_mode(mode):
        out = work.call(inputs)
        if not work.leaves:
            return [out]
        weight = torch.ones_like(out) if upstream is None else upstream.to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, [inputs[name] for name in work.leaves], weight)]


def widen(inputs: Inputs) -> Inputs:
    """Float inputs in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def check_work(work: Work, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """{name, dtype, passed, error (largest, in rounding steps of the largest value), detail}."""
    inputs = work.make(device, dtype, seed)
    # fp32 products are compared as fp32, not as tf32
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    expected = outputs(work, widen(inputs), "torch", None)
    upstream = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.float64)
    if expected[0].dim() == 0:
        upstream = torch.full_like(upstream, 0.5)
    expected = outputs(work, widen(inputs), "torch", upstream.to(dtype))
    poison(device)
    found = outputs(work, inputs, "triton", upstream.to(dtype))
    poison(device)
    again = outputs(work, inputs, "triton", upstream.to(dtype))
    torch.set_float32_matmul_precision(precision)
    errors = []
    for one, other in zip(found, expected, strict=True):
        scale = max(float(other.abs().max()), 1e-12) if other.numel() else 1.0
        step = EPS.get(one.dtype, EPS[dtype])
        errors.append(float((one.double() - other.double()).abs().max()) / scale / step if other.numel() else 0.0)
    equal = all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    limit = STEPS.get(work.op, 4.0) * (8.0 if dtype == torch.float32 else 1.0)
    worst = max(float("inf") if error != error else error for error in errors)
    passed = worst <= limit and equal
    detail = f"largest error {worst:.2f} steps (limit {limit:.0f})" + ("" if equal else "; two runs differ")
    name = str(dtype).removeprefix("torch.")
    return {"op": work.op, "name": work.name, "dtype": name, "passed": passed, "error": worst, "detail": detail}


def check_guards(work: Work, device: str, dtype: torch.dtype, seed: int = 0) -> list[str]:
    """Faults of one operator run in guarded memory: writes outside a tensor, results that depend on what lies there."""
    inputs = work.make(device, dtype, seed)
    plain = outputs(work, inputs, "triton", None)
    name = f"{work.name} {str(dtype).removeprefix('torch.')}"
    found: list[str] = []
    for fill in FILLS:
        with guarded_launches(fill) as faults:
            guarded = outputs(work, inputs, "triton", None)
        found += [f"{name}: {fault}" for fault in faults]
        if not all(torch.equal(one, other) for one, other in zip(guarded, plain, strict=True)):
            found.append(f"{name}: the result depends on memory around a tensor")
    return sorted(set(found))
