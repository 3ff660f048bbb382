"""Argument checks shared by the operators. Values are looked at on a CPU only: on a GPU the host would wait for them."""

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


def _readable(tensor: torch.Tensor) -> bool:
    """Whether looking at values is free: eager, on a CPU, not a tracer's stand-in."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and type(tensor) is torch.Tensor


def expect_indices(name: str, ids: torch.Tensor, limit: int) -> None:
    """Raise IndexError naming the argument unless its values are 0 to limit - 1; nothing where they cannot be seen."""
    if not _readable(ids) or ids.numel() == 0:
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= limit:
        raise IndexError(f"{name}: expected values from 0 to {limit - 1}, found {low if low < 0 else high}")


def expect_permutation(name: str, ids: torch.Tensor) -> None:
    """Raise IndexError or ValueError unless every row of ids [B, L] holds 0 to L - 1 once; nothing where unseen."""
    expect_indices(name, ids, ids.shape[1])
    if not _readable(ids):
        return
    complete = torch.zeros(ids.shape, dtype=torch.bool).scatter_(1, ids, True).all(dim=1)
    if not complete.all():
        row = int(complete.logical_not().nonzero()[0])
        raise ValueError(f"{name}: expected a permutation in every row, found a value twice in row {row}")
