"""What runs on a CPU, against formulas written apart from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lut_kernels import attention, embed_tokens, gather_patches, reconstruction_loss, unshuffle_tokens

from tests.golden_data import Golden, golden_files, load_golden
from tests.kernels.samples import (
    MEAN,
    STD,
    normalised_chw,
    patchify,
    plain_attention,
    plain_loss,
    randn,
    random_ids,
    random_pixels,
)

SETTINGS = settings(max_examples=20, deadline=None, derandomize=True)


@SETTINGS
@given(
    batch=st.integers(1, 3),
    patch=st.integers(1, 9),
    grid=st.integers(1, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_gather_reads_the_wanted_patches(batch: int, patch: int, grid: int, share: float, seed: int) -> None:
    pixels = random_pixels(batch, patch * grid, seed)
    ids = random_ids(batch, grid * grid, round(share * grid * grid), seed)
    every = patchify(normalised_chw(pixels), patch)
    wanted = torch.stack([rows[chosen] for rows, chosen in zip(every, ids)])
    torch.testing.assert_close(gather_patches(pixels, ids, patch, MEAN, STD).double(), wanted, atol=2e-6, rtol=0)
    torch.testing.assert_close(gather_patches(pixels, None, patch, MEAN, STD).double(), every, atol=2e-6, rtol=0)
    floats = normalised_chw(pixels)
    assert torch.equal(gather_patches(floats, ids, patch, dtype=torch.float64), wanted)


def test_gather_of_a_slice_of_stacked_views() -> None:
    views = random_pixels(4, 12).view(2, 2, 12, 12, 3)
    ids = random_ids(2, 9, 4)
    assert torch.equal(gather_patches(views[:, 1], ids, 4), gather_patches(views[:, 1].contiguous(), ids, 4))


def test_gather_default_scale_is_unit_range() -> None:
    rows = gather_patches(torch.full((1, 4, 4, 3), 255, dtype=torch.uint8), None, 2)
    torch.testing.assert_close(rows, torch.ones(1, 4, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embed_sums_in_the_wider_dtype(dtype: torch.dtype) -> None:
    x, cls, pos = randn(2, 5, 8, dtype=dtype), randn(1, 1, 8, seed=1).float(), randn(1, 10, 8, seed=2).float()
    ids = random_ids(2, 9, 5)
    out = embed_tokens(x, cls, pos, ids)
    assert out.dtype == dtype
    assert torch.equal(out[:, 0], (cls[:, 0] + pos[:, 0]).to(dtype).expand(2, 8))
    for sample in range(2):
        assert torch.equal(out[sample, 1:], (x[sample].float() + pos[0, 1 + ids[sample]]).to(dtype))
    whole = embed_tokens(randn(2, 9, 8, dtype=dtype), cls, pos, None)
    assert torch.equal(whole[:, 1:], (randn(2, 9, 8, dtype=dtype).float() + pos[:, 1:]).to(dtype))


@pytest.mark.parametrize("kept", [0, 1, 4, 9])
def test_unshuffle_puts_every_token_in_its_place(kept: int) -> None:
    x, mask, pos = randn(2, 1 + kept, 8), randn(1, 1, 8, seed=1), randn(1, 10, 8, seed=2)
    shuffle = random_ids(2, 9, 9)
    out = unshuffle_tokens(x, mask, pos, shuffle.argsort(1)) - pos
    for sample in range(2):
        torch.testing.assert_close(out[sample, 0], x[sample, 0])
        torch.testing.assert_close(out[sample, 1 + shuffle[sample, :kept]], x[sample, 1:])
        torch.testing.assert_close(out[sample, 1 + shuffle[sample, kept:]], mask[0].expand(9 - kept, 8))


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("layout", ["u8", "chw"])
def test_loss_and_its_gradient(norm_pix: bool, layout: str) -> None:
    pixels, ids = random_pixels(2, 12), random_ids(2, 9, 5)
    source, mean, std = (pixels, MEAN, STD) if layout == "u8" else (normalised_chw(pixels).float(), None, None)
    pred = randn(2, 5, 48).requires_grad_()
    ours = pred.detach().float().requires_grad_()
    expected = plain_loss(pred, pixels, ids, 4, norm_pix)
    loss = reconstruction_loss(ours, source, ids, 4, mean, std, norm_pix)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(expected, pred)
    (our_gradient,) = torch.autograd.grad(loss, ours)
    torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(our_gradient.double(), gradient, atol=1e-8, rtol=1e-4)


@SETTINGS
@given(tokens=st.integers(1, 130), heads=st.integers(1, 3), head_dim=st.integers(1, 20), seed=st.integers(0, 99))
def test_attention_forward_and_backward(tokens: int, heads: int, head_dim: int, seed: int) -> None:
    qkv = randn(2, tokens, 3 * heads * head_dim, seed=seed).requires_grad_()
    upstream = randn(2, tokens, heads * head_dim, seed=seed + 1)
    expected = plain_attention(qkv, heads)
    (gradient,) = torch.autograd.grad(expected, qkv, upstream)
    ours = qkv.detach().float().requires_grad_()
    out = attention(ours, heads)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(out, ours, upstream.float())[0].double(), gradient, atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("tokens", [50, 197])
def test_attention_bf16_is_as_good_as_bf16_can_be(tokens: int) -> None:
    qkv = randn(2, tokens, 3 * 2 * 64, dtype=torch.bfloat16)
    wide = qkv.double().requires_grad_()
    ours = qkv.requires_grad_()
    upstream = randn(2, tokens, 128, seed=1, dtype=torch.bfloat16)
    expected, out = plain_attention(wide, 2), attention(ours, 2)
    (gradient,) = torch.autograd.grad(expected, wide, upstream.double())
    (our_gradient,) = torch.autograd.grad(out, ours, upstream)
    assert (out.double() - expected).norm() / expected.norm() < 8e-3
    assert (our_gradient.double() - gradient).norm() / gradient.norm() < 8e-3


def mae_cases() -> list[Golden]:
    """The stored MAE iterations."""
    return [load_golden(path) for path in golden_files("mae_*.safetensors")]


@pytest.mark.parametrize("golden", mae_cases(), ids=lambda golden: golden.path.stem)
def test_golden_patches_and_loss(golden: Golden) -> None:
    patch = golden.config["patch_size"]
    view, mask, pred = golden["in.view"], golden["out.mask"], golden["out.pred"]
    assert torch.equal(gather_patches(view, None, patch), golden["out.patchified_input"])
    hidden = mask.nonzero()[:, 1].view(len(mask), -1)
    chosen = pred.gather(1, hidden[:, :, None].expand(-1, -1, pred.shape[2]))
    losses = [reconstruction_loss(chosen, view, hidden, patch, norm_pix=norm_pix) for norm_pix in (True, False)]
    assert min(abs(loss - golden["out.loss"]) for loss in losses) < 5e-6
