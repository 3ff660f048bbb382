"""Position tables and their interpolation against stored numbers (golden README, section 5)."""

import hashlib
import re
import warnings
from typing import Any

import pytest
import torch

from lut_ds.method.posembed import interpolate_positions, sincos_position_table
from tests.golden_data import golden_files, golden_json, load_golden

POSEMBED = load_golden(*golden_files("posembed.safetensors"))
TABLES = golden_json("schedules.json")["pos_embed"]


@pytest.mark.parametrize("stored", TABLES, ids=lambda stored: f"{stored['dim']}x{stored['grid']}")
def test_golden_position_sums(stored: dict[str, Any]) -> None:
    table = sincos_position_table(stored["dim"], stored["grid"])
    assert table.dtype == torch.float32
    assert list(table.shape) == [1, *stored["shape_with_cls"]]
    wide, columns = table[0].double(), stored["columns_listed"]
    # The stored sums are of the float64 table: allow half a float32 ulp for each of its values, of random sign.
    atol = 6e-8 * wide.numel() ** 0.5
    assert wide.sum().item() == pytest.approx(stored["sum"], rel=0, abs=atol)
    assert wide.abs().sum().item() == pytest.approx(stored["abs_sum"], rel=0, abs=atol)
    assert wide.abs().sum(1).max().item() == pytest.approx(stored["max_abs_row_sum"], rel=0, abs=atol)
    weights = torch.arange(1, wide.numel() + 1, dtype=torch.float64) / wide.numel()
    assert (wide.flatten() * weights).sum().item() == pytest.approx(stored["weighted_sum"], rel=0, abs=atol)
    first = torch.tensor(stored["first_rows_float32"])
    torch.testing.assert_close(table[0, : len(first), :columns], first, atol=1e-7, rtol=0)
    torch.testing.assert_close(table[0, -1, :columns], torch.tensor(stored["last_row_float32"]), atol=1e-7, rtol=0)
    digest = hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest()
    if digest != stored["sha256_of_float32_little_endian"]:
        warnings.warn("position table: other float32 bits than stored; sin and cos of this libm differ", stacklevel=1)


@pytest.mark.parametrize("name", [name for name in POSEMBED.tensors if name.startswith("pos_embed.")])
def test_golden_position_table(name: str) -> None:
    width, grid = map(int, name.removeprefix("pos_embed.").split("x"))
    torch.testing.assert_close(sincos_position_table(width, grid)[0], POSEMBED[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in POSEMBED.tensors if re.fullmatch(r"interp\..*\.in", name)])
def test_golden_position_interpolation(name: str) -> None:
    stem = name.removesuffix(".in")
    grid = int(stem.rpartition("to")[2])
    torch.testing.assert_close(interpolate_positions(POSEMBED[name], grid), POSEMBED[stem + ".out"], atol=1e-6, rtol=0)


def test_golden_position_files_are_complete() -> None:
    prefixes = {name.partition(".")[0] for name in POSEMBED.tensors}
    assert prefixes == {"pos_embed", "interp"}
    assert TABLES
