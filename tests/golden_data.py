"""Access to the golden data: numbers stored from the methods' published implementations (see README.md in the folder).

The folder is the environment variable LUT_GOLDEN_DIR, by default `tests/golden`. Other folders hold files of the same
names with other sizes and settings, so tests read every dimension from the metadata.
"""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN_DIR = Path(os.environ.get("LUT_GOLDEN_DIR") or Path(__file__).parent / "golden")


@dataclass(frozen=True)
class Golden:
    """One safetensors file: its metadata and all of its tensors."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        """Constructor and optimizer settings of the stored run."""
        return self.meta["config"]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors named `prefix.<name>`, by <name>."""
        return {
            name.removeprefix(prefix + "."): value
            for name, value in self.tensors.items()
            if name.startswith(prefix + ".")
        }


@lru_cache
def load_golden(path: Path) -> Golden:
    """Read one safetensors file; do not change the tensors in place."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        return Golden(path, meta, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def golden_files(pattern: str) -> list[Path]:
    """Files of the golden folder that match a glob pattern; none at all is an error, never an empty test."""
    files = sorted(GOLDEN_DIR.glob(pattern))
    if not files:
        raise FileNotFoundError(f"golden data: {GOLDEN_DIR}: expected files {pattern}, found none; set LUT_GOLDEN_DIR")
    return files


@lru_cache
def golden_json(name: str) -> dict[str, Any]:
    """One JSON file of the golden folder."""
    return json.loads((GOLDEN_DIR / name).read_text())


def reproducible(name: str, value: Tensor) -> Tensor:
    """The part of a gradient, or of a weight it moved, that is not rounding noise.

    The key third of a `attn.qkv.bias` has exactly zero true gradient, because softmax is shift invariant.
    """
    if not name.endswith("attn.qkv.bias"):
        return value
    query, _, val = value.chunk(3)
    return torch.cat([query, val])


def assert_states_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float, skip_noise: bool = False
) -> None:
    """Same names, same shapes, values within `atol`; integers equal. With `skip_noise` noise thirds are left out."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        pair = (reproducible(name, found[name]), reproducible(name, want)) if skip_noise else (found[name], want)
        tolerance = atol if want.is_floating_point() else 0
        torch.testing.assert_close(*pair, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
