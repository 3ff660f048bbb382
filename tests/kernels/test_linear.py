"""Linear layers through the faster library: the same values and gradients, refused cases left to torch."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lut_kernels import kernels_mode, linear
from lut_kernels import linear as package_export
from lut_kernels.linear import linear_side

module = sys.modules["lut_kernels.linear"]

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN: linear is torch's own"
)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where oneDNN wins, for products of any size."""
    monkeypatch.setattr(module, "onednn_is_faster", lambda dtype: dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(module, "_SMALLEST", 0)


def gradients(function, x, weight, bias, upstream):  # type: ignore[no-untyped-def]
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = function(*inputs, *([None] if bias is None else []))
    return out.detach(), torch.autograd.grad(out, inputs, upstream)


@settings(max_examples=30, deadline=None)
@given(
    lead=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    biased=st.booleans(),
)
def test_values_and_gradients_are_the_librarys(lead: list[int], k: int, n: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(k * 41 + n)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    x, weight, bias, upstream = draw(*lead, k), draw(n, k), draw(n) if biased else None, draw(*lead, n)
    expected = gradients(F.linear, x, weight, bias, upstream)
    single = [t.float() if t is not None else None for t in (x, weight, bias, upstream)]
    found = gradients(torch.ops.lut_kernels.linear, *single)
    for ours, theirs in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("onednn")
def test_takes_what_it_is_for_and_leaves_the_rest() -> None:
    assert linear_side("cpu", torch.float32) == "onednn"
    assert linear_side("cpu", torch.float64) == "torch"
    assert linear_side("cuda", torch.float32) == "torch"
    with kernels_mode("torch"):
        assert linear_side("cpu", torch.float32) == "torch"
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    for empty in (torch.randn(0, 4), torch.randn(2, 0, 4)):
        assert linear(empty, weight).shape == (*empty.shape[:-1], 5)
    assert torch.equal(linear(x[0], weight), F.linear(x[0], weight))
    with pytest.raises(RuntimeError):
        linear(x, torch.randn(5, 3))
    assert package_export is linear


@pytest.mark.usefixtures("onednn")
def test_strided_inputs_and_repeated_runs() -> None:
    x, weight = torch.randn(6, 8, 10).transpose(0, 1)[:, ::2], torch.randn(10, 7).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert torch.equal(linear(x, weight), linear(x, weight))


def test_is_an_operator_that_compiles() -> None:
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,)))
    torch.library.opcheck(torch.ops.lut_kernels.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.lut_kernels.linear.default, (x, weight, None))


def test_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda dtype: dtype in (torch.float32, torch.bfloat16))
    seen = []
    monkeypatch.setattr(module.F, "linear", lambda *inputs: seen.append(inputs))
    linear(torch.randn(8, 16), torch.randn(4, 16))
    assert len(seen) == 1
    assert linear(torch.randn(256, 256), torch.randn(64, 256)).shape == (256, 64)
    assert len(seen) == 1


def test_the_compiler_can_trace_the_choice() -> None:
    """In one graph, on this processor as it is, with a product that is large enough for either side."""
    x, weight, bias = torch.randn(256, 256), torch.randn(256, 256), torch.randn(256)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
