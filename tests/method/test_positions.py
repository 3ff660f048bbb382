"""Position tables: layout, and resampling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_ds.config import load_recipe
from lut_ds.engine.build import build_student
from lut_ds.method.posembed import interpolate_positions, position_table, sincos_position_table


@settings(deadline=None, max_examples=40)
@given(quarter=st.integers(1, 16), grid=st.integers(1, 9), data=st.data())
def test_every_entry_is_the_formula(quarter: int, grid: int, data: st.DataObject) -> None:
    table = sincos_position_table(4 * quarter, grid)
    assert table.shape == (1, 1 + grid * grid, 4 * quarter)
    assert not table[0, 0].any()
    row, col, k = (data.draw(st.integers(0, end - 1)) for end in (grid, grid, quarter))
    w = 10000.0 ** (-k / quarter)
    entry = table[0, 1 + row * grid + col]
    expected = [math.sin(col * w), math.cos(col * w), math.sin(row * w), math.cos(row * w)]
    assert [entry[k + i * quarter].item() for i in range(4)] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("width", [30, 33, 2])
def test_width_must_be_a_multiple_of_four(width: int) -> None:
    with pytest.raises(ValueError, match="width"):
        sincos_position_table(width, 4)


@settings(deadline=None, max_examples=20)
@given(old=st.integers(1, 8), new=st.integers(1, 12))
def test_interpolation_keeps_constants_and_the_cls_row(old: int, new: int) -> None:
    table = torch.full((1, 1 + old * old, 8), 0.7)
    table[:, 0] = torch.arange(8.0)
    resampled = interpolate_positions(table, new)
    assert resampled.shape == (1, 1 + new * new, 8)
    assert torch.equal(resampled[:, 0], table[:, 0])
    torch.testing.assert_close(resampled[:, 1:], torch.full((1, new * new, 8), 0.7))


def test_interpolation_to_the_same_grid_changes_nothing_and_keeps_rows_apart_from_columns() -> None:
    table = sincos_position_table(16, 5)
    assert torch.equal(interpolate_positions(table, 5), table)
    bigger = interpolate_positions(table, 10)[0, 1:].reshape(10, 10, 16)
    # The first half of the channels encodes the column only, the second half the row only.
    torch.testing.assert_close(bigger[:1, :, :8].expand(10, -1, -1), bigger[..., :8], atol=1e-5, rtol=0)
    torch.testing.assert_close(bigger[:, :1, 8:].expand(-1, 10, -1), bigger[..., 8:], atol=1e-5, rtol=0)


def test_interpolation_keeps_the_dtype() -> None:
    assert interpolate_positions(sincos_position_table(8, 4).bfloat16(), 6).dtype == torch.bfloat16


def test_a_table_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="table"):
        interpolate_positions(torch.zeros(1, 1 + 12, 8), 4)


@settings(deadline=None, max_examples=30)
@given(half=st.integers(1, 16), grid=st.integers(1, 9), data=st.data())
def test_every_entry_of_the_sinusoid_is_the_formula(half: int, grid: int, data: st.DataObject) -> None:
    table = position_table("sinusoid_1d", 2 * half, grid)
    assert table.shape == (1, 1 + grid * grid, 2 * half)
    index, k = data.draw(st.integers(0, grid * grid - 1)), data.draw(st.integers(0, half - 1))
    angle = index * 10000.0 ** (-k / half)
    pair = table[0, 1 + index, 2 * k : 2 * k + 2].tolist()
    assert pair == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)


def test_the_recipe_chooses_the_positions_of_encoder_and_decoder() -> None:
    for positions in ("sincos_2d", "sinusoid_1d"):
        student = build_student(load_recipe("demo", [f"model.positions={positions}"]))
        for part, width in ((student.encoder, 96), (student.decoder, 64)):
            assert torch.equal(part.pos_embed, position_table(positions, width, 6))
