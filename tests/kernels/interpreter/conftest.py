"""Tests of this folder run the Triton kernels on the CPU: `tests/kernels/test_interpreted.py` starts them in a process
of their own with TRITON_INTERPRET=1, because Triton reads it once. In any other process there is nothing to collect.
"""

import os
from typing import Any

import numpy as np
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def _to_float(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) to their float32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bits(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 bit patterns, rounded to nearest even as the hardware does."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def repair_bf16() -> None:
    """Triton 3.6's interpreter keeps bf16 as raw bits: its dot multiplies the bits, and its cast from fp32 truncates."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        wide = [TensorHandle(_to_float(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, d, input_precision, max_num_imprecise_acc)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(_to_float(source.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bits(source.data), tl.bfloat16)
        return cast(self, source, target)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):  # these were bound to the old one when the class was made
        setattr(InterpreterBuilder, name, lambda self, source, target: cast_impl(self, source, target))


if INTERPRETED:
    repair_bf16()
