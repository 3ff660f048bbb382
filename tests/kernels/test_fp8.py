"""fp8 linear layers: how far rounding goes, the exact product of what was rounded, bad values stay bad."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lut_kernels.fp8 import CAPABILITY, E4M3, LARGEST, fp8_linear, quantise_rows


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 50), power=st.integers(-30, 30), seed=st.integers(0, 99))
def test_rounding_is_half_a_unit_of_e4m3(rows: int, columns: int, power: int, seed: int) -> None:
    x = drawn(rows, columns, seed=seed) * 2.0**power
    found, scale = quantise_rows(x)
    assert found.dtype == E4M3
    assert scale.shape == (rows, 1)
    assert (found.float().abs().amax(1) == LARGEST).all()  # each row uses the whole range
    error = (found.double() * scale.double() - x.double()).abs()
    # 3 bits of mantissa; below 2**-6 of the scale the spacing is even
    allowed = torch.maximum(x.double().abs() * 2.0**-4, scale.double() * 2.0**-10) * (1 + 1e-6)
    assert (error <= allowed).all()


@settings(max_examples=20, deadline=None)
@given(
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    biased=st.booleans(),
)
def test_multiplies_what_was_rounded_exactly(lead: list[int], k: int, n: int, biased: bool) -> None:
    x, bias = drawn(*lead, k), drawn(n, seed=2) if biased else None
    weight, weight_scale = quantise_rows(drawn(n, k, seed=1) * 0.02)
    rows, scale = quantise_rows(x.flatten(0, -2))
    expected = (rows.double() * scale) @ (weight.double() * weight_scale).T + (0 if bias is None else bias.double())
    found = fp8_linear(x, weight, weight_scale, bias)
    assert found.shape == (*lead, n)
    torch.testing.assert_close(found.double(), expected.view(*lead, n), rtol=1e-5, atol=1e-5)


def test_is_the_librarys_scaled_product() -> None:
    """`torch._scaled_mm` runs on a CPU with one scale for all; with 1 it multiplies the same 8-bit values."""
    x = drawn(32, 64)
    weight, weight_scale = quantise_rows(drawn(48, 64, seed=1))
    rows, scale = quantise_rows(x)
    one = torch.ones(())
    product = torch._scaled_mm(rows, weight.t(), one, one, out_dtype=torch.float32)
    torch.testing.assert_close(fp8_linear(x, weight, weight_scale), product * scale * weight_scale.t())


def test_bad_values_stay_bad_and_zeros_stay_zeros() -> None:
    weight, weight_scale = quantise_rows(drawn(16, 32))
    x = torch.zeros(3, 32)
    x[0, 5], x[1, 7] = torch.nan, torch.inf
    found = fp8_linear(x, weight, weight_scale)
    assert found[:2].isnan().all()
    assert (found[2] == 0).all()


def test_refuses_other_numbers_and_shapes() -> None:
    weight, weight_scale = quantise_rows(drawn(16, 32))
    with pytest.raises(TypeError, match="x: expected dtype bfloat16, float32, found float16"):
        fp8_linear(drawn(3, 32).half(), weight, weight_scale)
    with pytest.raises(TypeError, match="weight: expected dtype float8_e4m3fn"):
        fp8_linear(drawn(3, 32), drawn(16, 32), weight_scale)
    with pytest.raises(ValueError, match=r"weight: expected shape \[\*, 31\]"):
        fp8_linear(drawn(3, 31), weight, weight_scale)
    with pytest.raises(ValueError, match=r"weight_scale: expected shape \[16, 1\]"):
        fp8_linear(drawn(3, 32), weight, weight_scale.t())


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY, reason="needs a GPU with fp8"
)
@pytest.mark.parametrize("biased", [False, True])
def test_tensor_cores_give_the_reference(biased: bool) -> None:
    x, bias = drawn(197, 384, dtype=torch.bfloat16), drawn(1152, seed=2, dtype=torch.bfloat16) if biased else None
    weight, weight_scale = quantise_rows(drawn(1152, 384, seed=1))
    expected = fp8_linear(x, weight, weight_scale, bias)
    on_gpu = [None if t is None else t.cuda() for t in (x, weight, weight_scale, bias)]
    found = fp8_linear(*on_gpu)  # type: ignore[arg-type]
    torch.testing.assert_close(
        found.cpu(), expected, rtol=2e-2, atol=5e-1
    )  # of sums of size 20: fewer bits while adding
