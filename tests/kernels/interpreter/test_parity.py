"""Every kernel, interpreted, against the plain-torch reference in float64: odd shapes, both layouts, strided inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lut_kernels import (
    attention,
    choice,
    embed_tokens,
    gather_patches,
    kernels_mode,
    reconstruction_loss,
    unshuffle_tokens,
)
from torch import Tensor

from tests.kernels.samples import MEAN, STD, normalised_chw, plain_attention, randn, random_ids, random_pixels

FEW = settings(max_examples=12, deadline=None, derandomize=True)
MANY = settings(max_examples=30, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# units in the last place of the output's dtype, as a relative tolerance
ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}


def poison() -> None:
    """Leave NaN in freed memory, so that an element a kernel forgets to write is seen."""
    for size in (64, 1024, 16384, 262144):
        torch.full((size,), float("nan"))


def run(function: Callable[..., Tensor], leaves: list[Tensor], mode: str, upstream: Tensor | None) -> list[Tensor]:
    """Output and the gradients of the leaves, with one side forced."""
    leaves = [value.detach().clone().requires_grad_() for value in leaves]
    poison()
    with kernels_mode(mode):
        out = function(*leaves)
    if upstream is None:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def compare(function: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor | None, ulps: float = 4) -> None:
    """Kernel in the leaves' dtype against the reference in float64; twice, with the same bits."""
    found = run(function, leaves, "triton", upstream)
    wide = None if upstream is None else upstream.double()
    expected = run(function, [value.double() for value in leaves], "torch", wide)
    for one, again, other in zip(found, run(function, leaves, "triton", upstream), expected, strict=True):
        assert torch.equal(one, again)
        # inputs are of order one: a sum of them may cancel, and keeps the rounding of its terms
        scale = max(float(other.abs().max()), 1.0) if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other.double(), atol=ulps * ULP[one.dtype] * scale, rtol=0)


def check_gather(batch: int, patch: int, grid: int, kept: int, dtype: torch.dtype, layout: str, seed: int) -> None:
    pixels = random_pixels(2 * batch, patch * grid, seed).unflatten(0, (batch, 2))[:, 1]  # strided over the batch
    ids = random_ids(batch, grid * grid, min(kept, grid * grid), seed) if kept else None
    source, mean, std = (pixels, MEAN, STD) if layout == "u8" else (normalised_chw(pixels).float(), None, None)
    with kernels_mode("triton"):
        poison()
        found = gather_patches(source, ids, patch, mean, std, dtype)
    expected = gather_patches(normalised_chw(pixels), ids, patch, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, atol=4 * ULP[dtype], rtol=ULP[dtype])
    if layout == "chw":
        assert torch.equal(found, expected.float().to(dtype))


@FEW
@given(
    batch=st.integers(1, 3),
    patch=st.sampled_from([1, 2, 5, 8, 14, 16]),
    grid=st.integers(1, 4),
    kept=st.integers(0, 16),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["u8", "chw"]),
    seed=st.integers(0, 99),
)
def test_gather(**shape: Any) -> None:
    check_gather(**shape)


def check_embed(batch: int, width: int, patches: int, kept: int, dtype: torch.dtype, seed: int) -> None:
    kept = min(kept, patches)
    ids = random_ids(batch, patches, kept, seed) if kept else None
    rows = kept or patches
    leaves = [randn(batch, rows, width, seed=seed, dtype=dtype), randn(1, 1, width, seed=seed + 1, dtype=dtype)]
    leaves.append(randn(1, 1 + patches, width, seed=seed + 2, dtype=dtype))
    upstream = randn(batch, 1 + rows, width, seed=seed + 3, dtype=dtype)
    compare(lambda x, cls, pos: embed_tokens(x, cls, pos, ids), leaves, upstream)


@FEW
@given(
    batch=st.integers(1, 3),
    width=st.integers(1, 70) | st.sampled_from([192, 384]),
    patches=st.integers(1, 20),
    kept=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_embed(**shape: Any) -> None:
    check_embed(**shape)


def test_embed_with_fp32_tables_and_narrow_tokens() -> None:
    x, cls, pos = randn(2, 5, 40).bfloat16(), randn(1, 1, 40, seed=1).float(), randn(1, 10, 40, seed=2).float()
    ids = random_ids(2, 9, 5)
    found, expected = (
        run(lambda *a: embed_tokens(*a, ids), [x, cls, pos], mode, randn(2, 6, 40)) for mode in ("triton", "torch")
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)


def check_unshuffle(batch: int, width: int, patches: int, kept: int, dtype: torch.dtype, seed: int) -> None:
    kept = min(kept, patches)
    restore = random_ids(batch, patches, patches, seed)
    leaves = [randn(batch, 1 + kept, width, seed=seed, dtype=dtype), randn(1, 1, width, seed=seed + 1, dtype=dtype)]
    leaves.append(randn(1, 1 + patches, width, seed=seed + 2, dtype=dtype))
    upstream = randn(batch, 1 + patches, width, seed=seed + 3, dtype=dtype)
    compare(lambda x, mask, pos: unshuffle_tokens(x, mask, pos, restore), leaves, upstream, ulps=16)


@FEW
@given(
    batch=st.integers(1, 3),
    width=st.integers(1, 70) | st.sampled_from([192, 384]),
    patches=st.integers(1, 40),
    kept=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_unshuffle(**shape: Any) -> None:
    check_unshuffle(**shape)


def check_loss(
    batch: int,
    patch: int,
    grid: int,
    masked: int,
    dtype: torch.dtype,
    layout: str,
    norm_pix: bool,
    upstream: float,
    seed: int,
) -> None:
    pixels = random_pixels(2 * batch, patch * grid, seed).unflatten(0, (batch, 2))[:, 1]
    ids = random_ids(batch, grid * grid, min(masked, grid * grid), seed)
    source, mean, std = (pixels, MEAN, STD) if layout == "u8" else (normalised_chw(pixels).float(), None, None)
    pred = randn(batch, ids.shape[1], 3 * patch**2, seed=seed, dtype=dtype)
    found = run(
        lambda p: reconstruction_loss(p, source, ids, patch, mean, std, norm_pix),
        [pred],
        "triton",
        torch.tensor(upstream),
    )
    expected = run(
        lambda p: reconstruction_loss(p, normalised_chw(pixels), ids, patch, None, None, norm_pix),
        [pred.double()], "torch", torch.tensor(upstream),
    )  # fmt: skip
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-5)
    scale = float(expected[1].abs().max())
    torch.testing.assert_close(found[1].double(), expected[1], atol=16 * ULP[dtype] * scale, rtol=ULP[dtype])


@FEW
@given(
    batch=st.integers(1, 3),
    patch=st.sampled_from([2, 5, 8, 14, 16]),
    grid=st.integers(1, 4),
    masked=st.integers(1, 16),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["u8", "chw"]),
    norm_pix=st.booleans(),
    upstream=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 99),
)
def test_loss(**shape: Any) -> None:
    check_loss(**shape)


def test_loss_of_a_flat_patch_is_finite() -> None:
    pixels, ids = torch.full((1, 8, 8, 3), 7, dtype=torch.uint8), random_ids(1, 4, 2)
    found = run(
        lambda p: reconstruction_loss(p, pixels, ids, 4), [randn(1, 2, 48).float()], "triton", torch.tensor(1.0)
    )
    assert all(bool(value.isfinite().all()) for value in found)


def check_attention(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int) -> None:
    qkv = randn(batch, tokens, 3 * heads * head_dim, seed=seed, dtype=dtype)
    upstream = randn(batch, tokens, heads * head_dim, seed=seed + 1, dtype=dtype)
    found = run(lambda x: attention(x, heads), [qkv], "triton", upstream)
    wide = qkv.double().requires_grad_()
    expected = plain_attention(wide, heads)
    (gradient,) = torch.autograd.grad(expected, wide, upstream.double())
    for one, other in zip(found, (expected, gradient), strict=True):
        assert one.dtype == dtype
        # softmax weights are rounded once to the dtype on the way into the second product
        limit = (32 if dtype == torch.float32 else 4) * ULP[dtype]
        torch.testing.assert_close(
            one.double(), other, atol=limit * max(float(other.detach().abs().max()), 1e-3), rtol=limit
        )
    with torch.no_grad(), kernels_mode("triton"):
        assert torch.equal(attention(qkv, heads), found[0])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(2, 70),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([4, 12, 24, 32, 64, 80]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@example(batch=1, tokens=50, heads=1, head_dim=64, dtype=torch.bfloat16, seed=0)
@example(batch=1, tokens=65, heads=1, head_dim=80, dtype=torch.bfloat16, seed=0)
def test_attention(**shape: Any) -> None:
    check_attention(**shape)


# 384 and 448 pixels with patch 16 and 14; the tiles of 16-bit types, whose step divides neither length
@pytest.mark.slow
@pytest.mark.parametrize("tokens, head_dim", [(577, 32), (577, 64), (577, 80), (1025, 32), (1025, 64)])
def test_attention_of_long_sequences(tokens: int, head_dim: int) -> None:
    check_attention(1, tokens, 1, head_dim, torch.float16, 0)


@pytest.mark.parametrize("tokens", [256, 257])
def test_attention_of_whole_tiles_and_one_more(tokens: int) -> None:
    check_attention(1, tokens, 1, 80, torch.bfloat16, 0)


def test_attention_with_large_scores() -> None:
    qkv = randn(1, 20, 3 * 16, dtype=torch.float32) * 60
    found = run(lambda x: attention(x, 1), [qkv], "triton", randn(1, 20, 16))
    assert all(bool(value.isfinite().all()) for value in found)
    torch.testing.assert_close(found[0].double(), plain_attention(qkv.double(), 1), atol=1e-3, rtol=1e-4)


def test_strided_inputs() -> None:
    qkv = randn(3, 11, 2 * 96, dtype=torch.float32)[..., ::2]
    x, mask, pos = (randn(*shape, dtype=torch.float32).transpose(1, 2) for shape in ((2, 8, 4), (1, 8, 1), (1, 8, 10)))
    restore, ids = random_ids(9, 2, 2).T.argsort(1), random_ids(2, 9, 6)[:, ::2]
    restore = random_ids(2, 9, 9)
    images = normalised_chw(random_pixels(2, 12)).float().transpose(2, 3)
    calls = [
        lambda: attention(qkv, 2),
        lambda: unshuffle_tokens(x, mask, pos, restore),
        lambda: embed_tokens(x[:, 1:], mask, pos, ids),
        lambda: gather_patches(images, ids, 4),
        lambda: reconstruction_loss(randn(2, 48, 3).float().transpose(1, 2), images, ids, 4),
    ]
    for call in calls:
        with kernels_mode("triton"):
            found = call()
        torch.testing.assert_close(found, call(), atol=1e-5, rtol=1e-5)


def test_gradcheck_of_the_kernels_in_float64() -> None:
    restore = random_ids(2, 5, 5)
    with kernels_mode("triton"):
        assert choice("attention", "cpu", torch.float64, 3, 4) == "triton"
        assert torch.autograd.gradcheck(lambda x: attention(x, 1), randn(1, 3, 12).requires_grad_())
        leaves = [
            randn(2, 3, 2).requires_grad_(),
            randn(1, 1, 2, seed=1).requires_grad_(),
            randn(1, 6, 2).requires_grad_(),
        ]
        assert torch.autograd.gradcheck(lambda x, m, p: unshuffle_tokens(x, m, p, restore), leaves)


def test_bad_ids_are_refused_before_a_kernel_runs() -> None:
    pixels, ids, pos = random_pixels(1, 8), torch.tensor([[0, 4, -1, 2]]), randn(1, 5, 8).float()
    calls = [
        lambda: gather_patches(pixels, ids, 4),
        lambda: embed_tokens(randn(1, 4, 8).float(), pos[:, :1], pos, ids),
        lambda: unshuffle_tokens(randn(1, 3, 8).float(), pos[:, :1], pos, ids),
        lambda: reconstruction_loss(randn(1, 4, 48).float(), pixels, ids, 4),
    ]
    for call in calls:
        with kernels_mode("triton"), pytest.raises(IndexError, match="expected values from 0 to 3, found -1"):
            call()


@pytest.mark.slow
@MANY
@given(
    batch=st.integers(1, 3),
    patch=st.integers(1, 18),
    grid=st.integers(1, 6),
    kept=st.integers(0, 36),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["u8", "chw"]),
    norm_pix=st.booleans(),
    seed=st.integers(0, 999),
)
def test_pixels_grid(batch: int, patch: int, grid: int, kept: int, norm_pix: bool, **rest: Any) -> None:
    check_gather(batch, patch, grid, kept, **rest)
    if patch > 1:
        check_loss(batch, patch, grid, max(kept, 1), norm_pix=norm_pix, upstream=1.0, **rest)


@pytest.mark.slow
@MANY
@given(
    batch=st.integers(1, 4),
    width=st.integers(1, 400),
    patches=st.integers(1, 60),
    kept=st.integers(0, 60),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_tokens_grid(**shape: Any) -> None:
    check_embed(**shape)
    check_unshuffle(**shape)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 130),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 96),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
@example(batch=1, tokens=197, heads=1, head_dim=64, dtype=torch.float16, seed=0)
@example(batch=1, tokens=257, heads=1, head_dim=80, dtype=torch.bfloat16, seed=0)
def test_attention_grid(**shape: Any) -> None:
    check_attention(**shape)
