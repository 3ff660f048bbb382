"""Argument checks shared by the operators. Shapes and dtypes only: a check of values would wait for the device."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expect_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError naming the argument unless `tensor` has this shape; None matches any size."""
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(want is not None and want != have for want, have in zip(shape, found)):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], found {list(found)}")


def expect_dtype(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError naming the argument unless its dtype is one of `allowed`."""
    if dtype not in allowed:
        names = ", ".join(str(one).removeprefix("torch.") for one in allowed)
        raise TypeError(f"{name}: expected dtype {names}, found {str(dtype).removeprefix('torch.')}")


def expect_device(name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Raise ValueError naming both arguments unless they are on one device."""
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} (that of {like_name}), found {tensor.device}")
