"""The encoder sees the visible patches and nothing else, and is timm's ViT."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lut_kernels import gather_patches
from torch import Tensor, nn

from lut_ds.method.encoder import Encoder
from lut_ds.method.lut import IMAGENET_MEAN, IMAGENET_STD, encode_views
from lut_ds.method.masking import disjoint_masks
from lut_ds.method.posembed import sincos_position_table
from tests.method.builders import bfloat16_weights, decoder_from, encoder_from, randomise, small


def small_encoder(**changes: object) -> Encoder:
    """A small encoder in which no weight is zero."""
    encoder = encoder_from(small(**changes))
    randomise(encoder)
    return encoder


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] to float [B, 3, S, S], ImageNet statistics."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def patch_mask(ids: Tensor, grid: int, patch: int) -> Tensor:
    """bool [B, 1, S, S]: the pixels of the patches `ids`."""
    flat = torch.zeros(len(ids), grid * grid, dtype=torch.bool).scatter_(1, ids, True)
    square = flat.view(-1, 1, grid, grid)
    return square.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), ratio=st.sampled_from([0.5, 0.6, 0.75, 0.9]), as_bytes=st.booleans())
def test_hidden_pixels_change_nothing(seed: int, ratio: float, as_bytes: bool) -> None:
    encoder = small_encoder(seed=seed, depth=1)
    masking = disjoint_masks(torch.rand(2, 16), ratio, 2)
    views = [torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8) for _ in range(2)]
    others = []
    for view, ids in zip(views, masking.ids_keep, strict=True):
        visible = patch_mask(ids, 4, 8).permute(0, 2, 3, 1)
        others.append(torch.where(visible, view, 255 - view))
    if not as_bytes:
        views, others = [normalise(v) for v in views], [normalise(v) for v in others]
    before, after = (encode_views(encoder, pixels, masking.ids_keep) for pixels in (views, others))
    assert torch.equal(before, after)


def test_a_visible_pixel_changes_its_view_and_sample_only() -> None:
    encoder = small_encoder()
    masking = disjoint_masks(torch.rand(2, 16), 0.75, 2)
    views = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    changed = [view.clone() for view in views]
    row, col = divmod(int(masking.ids_keep[1][0, 2]), 4)
    changed[1][0, 2, row * 8 + 3, col * 8 + 5] += 1.0
    before, after = (encode_views(encoder, pixels, masking.ids_keep) for pixels in (views, changed))
    moved = (before - after).abs().amax(dim=(1, 2))
    assert moved[2] > 1e-3  # view 2, sample 0
    assert not moved[[0, 1, 3]].any()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), kept=st.integers(1, 16))
def test_patches_are_a_set(seed: int, kept: int) -> None:
    encoder = small_encoder(seed=seed)
    view, ids = torch.randn(3, 3, 32, 32), torch.rand(3, 16).argsort(1)[:, :kept]
    order = torch.randperm(kept)
    straight = encode_views(encoder, [view], [ids])
    permuted = encode_views(encoder, [view], [ids[:, order]])
    torch.testing.assert_close(permuted[:, 0], straight[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted[:, 1:], straight[:, 1:][:, order], atol=1e-5, rtol=1e-5)


def test_position_counts() -> None:
    encoder = small_encoder()
    view = torch.randn(1, 3, 8, 8).repeat(1, 1, 4, 4)  # sixteen equal patches
    first, second = (encode_views(encoder, [view], [torch.tensor([[i]])]) for i in (0, 5))
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("as_bytes", [False, True])
def test_both_views_in_one_batch_equal_two_passes(as_bytes: bool) -> None:
    encoder = small_encoder()
    masking = disjoint_masks(torch.rand(3, 16), 0.75, 2)
    views = [torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8) for _ in range(2)]
    if not as_bytes:
        views = [normalise(view) for view in views]
    together = encode_views(encoder, views, masking.ids_keep)
    apart = [encode_views(encoder, [view], [ids]) for view, ids in zip(views, masking.ids_keep, strict=True)]
    assert together.shape == (6, 5, 32)
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size,patch", [(32, 8), (48, 16), (28, 14)])
def test_all_patches_equal_the_timm_path(size: int, patch: int) -> None:
    encoder = small_encoder(img_size=size, patch_size=patch)
    view = torch.randn(2, 3, size, size)
    ours = encode_views(encoder, [view], None)
    torch.testing.assert_close(encoder.forward_features(view), ours, atol=1e-5, rtol=0)
    every = torch.arange(ours.shape[1] - 1).expand(2, -1)
    torch.testing.assert_close(encode_views(encoder, [view], [every]), ours, atol=1e-6, rtol=0)


def test_bytes_and_normalised_floats_agree() -> None:
    encoder = small_encoder()
    pixels = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    ids = torch.rand(2, 16).argsort(1)[:, :5]
    for which in (None, [ids]):
        found = encode_views(encoder, [pixels], which)
        torch.testing.assert_close(found, encode_views(encoder, [normalise(pixels)], which), atol=2e-5, rtol=0)


@settings(deadline=None, max_examples=10)
@given(patch=st.sampled_from([4, 7, 8]), grid=st.integers(1, 4), heads=st.sampled_from([1, 2, 4]))
def test_bfloat16_follows_float32(patch: int, grid: int, heads: int) -> None:
    encoder = small_encoder(img_size=patch * grid, patch_size=patch, num_heads=heads)
    view = torch.randn(2, 3, patch * grid, patch * grid)
    wide = encode_views(encoder, [view], None)
    bfloat16_weights(encoder)
    narrow = encode_views(encoder, [view], None)
    assert narrow.dtype == torch.bfloat16
    assert encoder.pos_embed.dtype == torch.float32
    assert (narrow.float() - wide).abs().mean() < 0.05


def test_state_dict_loads_strictly_into_timm() -> None:
    encoder = small_encoder()
    reference = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    reference.load_state_dict(encoder.state_dict(), strict=True)
    view = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(reference.forward_features(view), encoder.forward_features(view), atol=1e-5, rtol=0)
    encoder.load_state_dict(reference.state_dict(), strict=True)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    encoder = small_encoder()
    view, ids = torch.randn(2, 3, 32, 32), torch.rand(2, 16).argsort(1)[:, :4]
    gradients = []
    for checkpointing in (False, True):
        encoder.set_grad_checkpointing(checkpointing)
        encoder.zero_grad()
        encode_views(encoder, [view], [ids]).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("checkpointing,passes", [(False, 1), (True, 2)])
def test_checkpointed_blocks_are_computed_again_in_the_backward_pass(checkpointing: bool, passes: int) -> None:
    encoder = small_encoder()
    encoder.set_grad_checkpointing(checkpointing)
    calls: list[int] = []
    for index, block in enumerate(encoder.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    view = torch.randn(2, 3, 32, 32)
    encode_views(encoder, [view], None).sum().backward()
    assert sorted(calls) == sorted([0, 1] * passes)
    with torch.no_grad():
        encode_views(encoder, [view], None)  # nothing to keep: never twice
    assert len(calls) == 2 * passes + 2


def test_positions_are_frozen_and_saved() -> None:
    encoder = encoder_from(small())
    assert "pos_embed" in encoder.state_dict()
    assert "pos_embed" not in dict(encoder.named_parameters())
    assert torch.equal(encoder.pos_embed, sincos_position_table(32, 4))


def test_initial_weights() -> None:
    config = small(embed_dim=64, num_heads=2)
    for module in (encoder_from(config), decoder_from(config)):
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                fan_out, fan_in = layer.weight.shape[0], layer.weight[0].numel()
                limit = (6 / (fan_in + fan_out)) ** 0.5
                assert layer.weight.abs().max() <= limit
                assert layer.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)
                assert not layer.bias.any()
            elif isinstance(layer, nn.LayerNorm):
                assert (layer.weight == 1).all()
                assert not layer.bias.any()
                assert layer.eps == 1e-6
        tokens = [p for name, p in module.named_parameters() if name in ("cls_token", "mask_token")]
        assert [0.01 < token.std() < 0.03 for token in tokens] == [True]


def test_vit_large_is_built_on_meta_without_memory() -> None:
    with torch.device("meta"):
        encoder = Encoder(224, 16, 1024, 24, 16)
    assert all(parameter.is_meta for parameter in encoder.parameters())
    block = 12 * 1024**2 + 13 * 1024  # qkv, proj, two MLP layers with biases, two norms
    expected = 24 * block + 16 * 16 * 3 * 1024 + 1024 + 1024 + 2 * 1024
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected
    real = [buffer for buffer in encoder.buffers() if not buffer.is_meta]
    assert sum(buffer.numel() * buffer.element_size() for buffer in real) < 2**20
    assert torch.equal(encoder.pos_embed, sincos_position_table(1024, 14))  # frozen positions are real even here


def test_patch_rows_and_images_give_the_same_embedding() -> None:
    encoder = small_encoder()
    view = torch.randn(2, 3, 32, 32)
    rows = gather_patches(view, None, 8)
    torch.testing.assert_close(encoder.patch_embed(rows), encoder.patch_embed(view), atol=1e-5, rtol=0)
