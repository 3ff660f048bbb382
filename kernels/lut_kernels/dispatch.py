"""Which side runs an operator: the plain-torch reference or the Triton kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OPS = ("gather_patches", "embed_tokens", "unshuffle_tokens", "reconstruction_loss", "attention")
MODES = ("auto", "torch", "triton")

_forced: str | None = None


def _valid(mode: str, where: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{where}: expected one of {', '.join(MODES)}, found {mode!r}")
    return mode


def current_mode() -> str:
    """The mode in force: the innermost `kernels_mode`, else the environment variable LUT_KERNELS, else auto."""
    return _forced or _valid(os.environ.get("LUT_KERNELS", "auto"), "LUT_KERNELS")


@contextmanager
def kernels_mode(mode: str) -> Iterator[None]:
    """Force a side for every operator called inside: `auto`, `torch` or `triton`. Process-wide, not per thread."""
    global _forced
    before, _forced = _forced, _valid(mode, "kernels_mode")
    try:
        yield
    finally:
        _forced = before


def choice(op: str, device: torch.device | str, dtype: torch.dtype, *shape: int) -> str:
    """What would run for this operator, device, dtype and shape: `torch` or `triton`."""
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, found {op!r}")
    if torch.device(device).type == "cpu" and current_mode() == "triton":
        raise ValueError("LUT_KERNELS: expected auto or torch on a CPU, found 'triton'")
    return "torch"
