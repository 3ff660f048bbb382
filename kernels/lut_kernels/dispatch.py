"""Which side runs an operator, and with which tiles: the committed table, the switch that overrides it, the look-up."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from lut_kernels.runtime import INTERPRETED, recording

OPS = ("gather_patches", "embed_tokens", "unshuffle_tokens", "reconstruction_loss", "attention")
MODES = ("auto", "torch", "triton")
MAX_HEAD_DIM = 128
TABLE_PATH = Path(__file__).with_name("table.json")

_environment = os.environ.get("LUT_KERNELS", "auto")
_forced: str | None = None
_forced_tiles: dict[str, dict[str, int]] = {}


def _valid(mode: str, where: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{where}: expected one of {', '.join(MODES)}, found {mode!r}")
    return mode


def current_mode() -> str:
    """The mode in force: the innermost `kernels_mode`, else the environment variable LUT_KERNELS, else auto."""
    return _forced or _environment


@contextmanager
def kernels_mode(mode: str) -> Iterator[None]:
    """Force a side for every operator called inside: `auto`, `torch` or `triton`. Process-wide, not per thread."""
    global _forced
    before, _forced = _forced, _valid(mode, "kernels_mode")
    try:
        yield
    finally:
        _forced = before


@contextmanager
def forced_tiles(tiles: dict[str, dict[str, int]]) -> Iterator[None]:
    """Inside, these kernels take these tiles instead of the table's: for tuning and for the resource table."""
    global _forced_tiles
    before, _forced_tiles = _forced_tiles, tiles
    try:
        yield
    finally:
        _forced_tiles = before


@cache
def table() -> dict[str, Any]:
    """The committed table: `choices` and `tiles` by architecture, each an ordered list of rules."""
    return json.loads(TABLE_PATH.read_text())


def forget_table() -> None:
    """Read the table again at the next look-up: it was rewritten, or replaced."""
    for cached in (table, _look_up, _tile):
        cached.cache_clear()


def architecture(device: torch.device) -> str:
    """`cpu`, or `sm_90` and the like."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def matches(rule: Mapping[str, Any], dtype: str, tokens: int, head_dim: int, training: bool) -> bool:
    """Whether a rule applies. A condition that is absent holds.

    `up_to` is the longest sequence the rule speaks for, `wider_than` the widest head dim it leaves to others.
    """
    return (
        dtype in rule.get("dtypes", (dtype,))
        and tokens <= rule.get("up_to", tokens)
        and head_dim in rule.get("head_dims", (head_dim,))
        and head_dim > rule.get("wider_than", -1)
        and training == rule.get("training", training)
    )


def rules(section: str, arch: str, op: str) -> list[dict[str, Any]]:
    """The rules for one operator: those of the architecture if it has any, else the default ones."""
    by_arch = table()[section]
    return by_arch.get(arch, {}).get(op) or by_arch["default"][op]


def check_mode(mode: str, device: torch.device) -> None:
    """Raise ValueError, naming the variable, the accepted values and the one found, if this mode cannot run here."""
    _valid(mode, "LUT_KERNELS")
    if mode == "triton" and device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "LUT_KERNELS: expected auto or torch, Triton needs a CUDA device or TRITON_INTERPRET=1; found triton"
        )


@lru_cache(maxsize=4096)
def _look_up(
    op: str, device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int, training: bool, mode: str
) -> str:
    check_mode(mode, device)
    name = str(dtype).removeprefix("torch.")
    found = [
        rule["use"]
        for rule in rules("choices", architecture(device), op)
        if matches(rule, name, tokens, head_dim, training)
    ]
    library = next(use for use in found if use != "triton")
    if head_dim > MAX_HEAD_DIM or (device.type == "cuda" and dtype == torch.float64):
        return library
    return {"auto": found[0], "torch": library, "triton": "triton"}[mode]


@torch.compiler.assume_constant_result
def _constant(
    op: str, device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int, training: bool, mode: str
) -> str:
    # The compiler calls this once and keeps the answer; the mode is an argument, so a change of mode recompiles.
    return _look_up(op, device, dtype, tokens, head_dim, training, mode)


def choice(op: str, device: torch.device | str, dtype: torch.dtype, *shape: int, training: bool = True) -> str:
    """What would run for this operator: `triton`, or a library path.

    shape: for `attention` the number of tokens N and the head dim; not needed for the others. training: whether a
    gradient will be asked for. Answers for attention: `triton`, `cudnn`, `flash`, `efficient`, `sdpa` (torch decides)
    or `plain` (matrix products and softmax); for the others `triton` or `torch`. Raises ValueError for an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, found {op!r}")
    device = torch.device(device) if isinstance(device, str) else device
    tokens, head_dim = shape if shape else (0, 0)
    return _constant(op, device, dtype, tokens, head_dim, training, current_mode())


@lru_cache(maxsize=4096)
def _tile(kernel: str, arch: str, dtype: str, tokens: int, head_dim: int) -> dict[str, int]:
    for rule in rules("tiles", arch, kernel):
        if matches(rule, dtype, tokens, head_dim, True):
            return rule["tile"]
    raise LookupError(f"{TABLE_PATH.name}: no tile for {kernel} {dtype} tokens={tokens} head_dim={head_dim}")


def tile(kernel: str, device: torch.device, dtype: torch.dtype, tokens: int = 0, head_dim: int = 0) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages of a kernel, from the table."""
    if kernel in _forced_tiles:
        return _forced_tiles[kernel]
    noted = recording()
    arch = architecture(device) if noted is None else noted.architecture
    return _tile(kernel, arch, str(dtype).removeprefix("torch."), tokens, head_dim)
