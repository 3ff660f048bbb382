"""FusedAttention inside timm's VisionTransformer."""

import itertools

import pytest
import torch
from lut_kernels import FusedAttention
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.kernels.samples import randn


def pair(**settings: object) -> tuple[Attention, FusedAttention]:
    """timm's layer and ours with the same weights."""
    torch.manual_seed(0)
    theirs = Attention(24, num_heads=3, qkv_bias=True, **settings)
    ours = FusedAttention(24, num_heads=3, qkv_bias=True, **settings)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def test_same_names_values_and_gradients_in_a_vision_transformer() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    theirs = VisionTransformer(**sizes)
    ours = VisionTransformer(**sizes, attn_layer=FusedAttention)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = randn(2, 3, 32, 32).float()
    outputs = [model(images) for model in (theirs, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-6, rtol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters()):
        torch.testing.assert_close(
            other.grad, one.grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


SETTINGS = [
    {"qk_norm": True, "norm_layer": nn.LayerNorm},
    {"scale_norm": True, "norm_layer": nn.LayerNorm},
    {"gated": True},
    {"attn_head_dim": 4},
    {"dim_out": 12},
    {"attn_drop": 0.5, "proj_drop": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
@pytest.mark.parametrize("training", [True, False])
def test_every_setting_equals_timm(settings: dict[str, object], training: bool) -> None:
    theirs, ours = pair(**settings)
    x = randn(2, 7, 24).float()
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(1)
        results.append(layer.train(training)(x))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


def test_masks_equal_timm() -> None:
    theirs, ours = pair()
    x = randn(2, 7, 24).float()
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    for arguments in ({"attn_mask": mask}, {"is_causal": True}):
        torch.testing.assert_close(ours(x, **arguments), theirs(x, **arguments))


def test_under_autocast() -> None:
    theirs, ours = pair()
    x = randn(2, 50, 24).float()
    with torch.autocast("cpu", torch.bfloat16):
        results = [layer(x) for layer in (ours, theirs)]
    assert results[0].dtype == torch.bfloat16
    torch.testing.assert_close(results[0], results[1], atol=2e-2, rtol=2e-2)


def test_half_precision_layers() -> None:
    for dtype, train in itertools.product((torch.bfloat16, torch.float16), (True, False)):
        theirs, ours = pair()
        x = randn(2, 50, 24)
        expected = theirs.double()(x)
        torch.testing.assert_close(ours.to(dtype).train(train)(x.to(dtype)).double(), expected, atol=1e-2, rtol=2e-2)
