"""Attention as the layers compute it, how far it reaches and where it goes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lut_kernels import FusedAttention
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

from lut_ds.analysis import attention_distance, attention_maps
from lut_ds.analysis.attention_distance import attention_entropy, patch_distances
from lut_ds.analysis.attention_maps import attention_to_patches
from lut_ds.analysis.figures import LIGHT
from lut_ds.analysis.subject import Found, check_attention, watch_attention, watch_tokens
from lut_ds.errors import UserError
from tests.analysis.models import small_vit, subject

VARIANTS = ({}, {"attn_layer": FusedAttention}, {"qk_norm": True}, {"reg_tokens": 2}, {"class_token": False})


def watched(model, images):
    calls = {}
    with watch_attention(model, calls.__setitem__):
        tokens = model.forward_features(images)
    return [calls[i] for i in range(len(model.blocks))], tokens


def unfused(model, images):
    """timm's own probabilities and the gradients of the mean token's square with respect to them."""
    found = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: found.append(output))
    value = model.forward_features(images)[:, model.num_prefix_tokens :].mean(dim=1).square().sum()
    return found, torch.autograd.grad(value, found)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_probabilities_and_their_gradients_are_those_of_timms_unfused_attention(options):
    model = small_vit(**options)
    images = next(subject(model).batches())
    calls, tokens = watched(model, images)
    value = tokens[:, model.num_prefix_tokens :].mean(dim=1).square().sum()
    grads = torch.autograd.grad(value, [call.output for call in calls])
    plain = small_vit(**{k: v for k, v in options.items() if k != "attn_layer"})
    plain.load_state_dict(model.state_dict())
    expected, gradients = unfused(plain, images)
    for call, grad, p, dp in zip(calls, grads, expected, gradients, strict=True):
        torch.testing.assert_close(call.probabilities(), p, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(call.gradient(grad), dp, atol=1e-5, rtol=1e-3)
        assert p.max() > 3 / p.shape[-1]  # something to tell apart


def test_watching_changes_nothing_and_ends():
    model = small_vit()
    images = next(subject(model).batches())
    before = model.forward_features(images)
    layers = []
    with watch_tokens(model, lambda index, tokens: layers.append((index, tokens))):
        _, during = watched(model, images)
    assert torch.equal(before, during)
    assert [index for index, _ in layers] == [0, 1, 2, 3]
    assert torch.equal(model.norm(layers[3][1]), before)
    model.forward_features(images)
    assert len(layers) == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), side=st.integers(1, 9), prefix=st.integers(0, 2))
def test_uniform_and_identity_attention_have_their_analytic_distance(rows, columns, side, prefix):
    distances = patch_distances((rows, columns), (side, side))
    places = [(r, c) for r in range(rows) for c in range(columns)]
    apart = np.array([[side * math.dist(a, b) for b in places] for a in places])
    np.testing.assert_allclose(distances.numpy(), apart, rtol=1e-6, atol=1e-5)
    n = prefix + rows * columns
    uniform = torch.full((2, 3, n, n), 1 / n)
    found = attention_distance.attention_distance(uniform, distances, prefix)
    np.testing.assert_allclose(found.numpy(), apart.mean(), rtol=1e-5, atol=1e-5)
    assert attention_entropy(uniform).allclose(torch.ones(2, 3)) or n == 1
    identity = torch.eye(n).expand(1, 1, n, n)
    assert attention_distance.attention_distance(identity, distances, prefix).abs().max() < 1e-5


def test_attention_to_the_cls_token_does_not_shorten_the_distance():
    distances = patch_distances((3, 3), (4, 4))
    p = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    half = p.clone()
    half[..., 1:] *= 0.1
    found = [attention_distance.attention_distance(q / q.sum(-1, keepdim=True), distances, 1) for q in (p, half)]
    torch.testing.assert_close(*found)


def test_a_head_that_looks_one_patch_to_the_right_has_the_patch_side_as_distance():
    """Queries and keys from positions alone: the layer itself, not only its probabilities."""
    model = small_vit(embed_dim=16, num_heads=1, depth=1, class_token=False)
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.copy_(torch.eye(16))
        block = model.blocks[0]
        block.norm1 = torch.nn.Identity()
        right = torch.eye(16)[[4 * (i // 4) + min(i % 4 + 1, 3) for i in range(16)]]  # [patch, the one to its right]
        block.attn.qkv.weight.copy_(torch.cat([400 * right.T, torch.eye(16), torch.eye(16)]))
        block.attn.qkv.bias.zero_()
    found = attention_distance.measure(subject(model)).numbers
    assert found["distance"] == [[pytest.approx(4 * 12 / 16, rel=1e-5)]]  # the last column looks at itself
    assert found["entropy"][0][0] == pytest.approx(0, abs=1e-6)
    assert found["prefix_share"] == [[0.0]]


def test_maps_are_the_cls_rows_over_the_patches():
    model = small_vit(reg_tokens=1)
    shown = subject(model, images=10)
    calls, _ = watched(model, next(shown.batches()))
    p = calls[-1].probabilities()
    expected = p[:, :, 0, 2:] / p[:, :, 0, 2:].sum(-1, keepdim=True)
    torch.testing.assert_close(attention_to_patches(p, 2, cls=True), expected)
    found = attention_maps.measure(shown)
    np.testing.assert_allclose(found.arrays["maps"], expected.reshape(8, 3, 4, 4).detach().numpy(), atol=1e-6)
    assert found.numbers["query"] == "cls"
    assert all(0 < e < 1 for heads in found.numbers["entropy"] for e in heads)
    assert all(1 <= count <= 16 for count in found.numbers["effective_patches"])


def test_without_a_cls_token_maps_are_the_mean_of_what_patches_look_at():
    p = torch.rand(2, 3, 9, 9).softmax(-1)
    torch.testing.assert_close(attention_to_patches(p, 0, cls=False), p.mean(dim=2))
    rows = p[:, :, 2:, 2:].mean(dim=2)  # registers do not ask, and are not looked at
    torch.testing.assert_close(attention_to_patches(p, 2, cls=False), rows / rows.sum(-1, keepdim=True))


def test_two_models_share_a_figure():
    both = [("first", small_vit()), ("second", small_vit(depth=2, num_heads=2))]
    for analysis in (attention_distance, attention_maps):
        figure = analysis.draw(LIGHT, [(name, analysis.measure(subject(model))) for name, model in both])
        words = {text.get_text() for axis in figure.axes for text in [*axis.texts, *_legend(axis)]}
        assert {"first", "second"} <= words, analysis


def _legend(axis):
    return axis.get_legend().get_texts() if axis.get_legend() else []


def test_heads_that_look_further_than_uniform_attention_are_in_the_picture():
    numbers = {"distance": [[1.0, 9.0], [20.0, 2.0]], "entropy": [[0.5, 0.5]] * 2, "uniform": 10.0}
    figure = attention_distance.draw(LIGHT, [("model", Found(numbers, {}))])
    assert figure.axes[0].get_ylim()[1] > 20


def test_attention_of_another_kind_is_refused():
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, block_fn=ParallelScalingBlock
    )
    with pytest.raises(UserError, match=r"x: expected timm's Attention in block 0, found none; .*--only"):
        check_attention(model, "x")
