"""Shapes of the pyramid and heads for any patch and size, and which parameters learn how fast."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lut_ds.config import Model
from lut_ds.engine.optim import layer_decay_groups
from lut_ds.method.heads import HeadBatchNorm
from lut_ds.transfer.segmentation.step import pixel_loss
from lut_ds.transfer.segmentation.upernet import (
    FCNHead,
    Neck,
    PyramidViT,
    Segmenter,
    UPerHead,
    pyramid_layers,
    region_means,
)


def segmenter(side: int = 32, patch: int = 8, classes: int = 3) -> Segmenter:
    torch.manual_seed(0)
    sizes = Model(image_size=side, patch_size=patch, width=32, depth=4, heads=2)
    return Segmenter(PyramidViT(sizes, pyramid_layers(4), 0.1), classes, channels=8, aux_channels=6)


def test_published_layers() -> None:
    assert pyramid_layers(12) == (3, 5, 7, 11)
    assert pyramid_layers(24) == (7, 11, 15, 23)


@settings(deadline=None, max_examples=25)
@given(patch=st.sampled_from([4, 8, 14, 16]), grid=st.integers(8, 13), width=st.integers(1, 5), batch=st.integers(1, 3))
def test_neck_makes_strides_4_8_16_32(patch: int, grid: int, width: int, batch: int) -> None:
    power = {4: 4, 8: 8, 14: 16, 16: 16}[patch]
    maps = Neck(width, patch).eval()([torch.randn(batch, width, grid, grid)] * 4)
    sides = [grid * power // stride for stride in (4, 8, 16, 32)]
    assert [tuple(one.shape) for one in maps] == [(batch, width, side, side) for side in sides]


@settings(deadline=None, max_examples=25)
@given(
    sides=st.lists(st.integers(1, 14), min_size=4, max_size=4),
    width=st.integers(1, 6),
    channels=st.integers(1, 6),
    classes=st.integers(2, 9),
    batch=st.integers(2, 3),
)
def test_head_shapes(sides: list[int], width: int, channels: int, classes: int, batch: int) -> None:
    maps = [torch.randn(batch, width, side, side) for side in sorted(sides, reverse=True)]
    head, auxiliary = UPerHead(width, channels, classes, 0.1), FCNHead(width, channels, classes, 0.1)
    assert head(maps).shape == (batch, classes, *maps[0].shape[2:])
    assert auxiliary(maps[2]).shape == (batch, classes, *maps[2].shape[2:])


@settings(deadline=None, max_examples=40)
@given(height=st.integers(1, 20), width=st.integers(1, 20), side=st.sampled_from([1, 2, 3, 6]))
def test_regions_are_those_of_adaptive_pooling(height: int, width: int, side: int) -> None:
    maps = torch.randn(2, 3, height, width)
    torch.testing.assert_close(region_means(maps, side), F.adaptive_avg_pool2d(maps, side))


class Called(TorchDispatchMode):
    """Names of the operators that run inside, gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_called_that_torch_refuses_where_bits_must_repeat() -> None:
    """`run.deterministic` on a GPU. The meta device takes the paths of one: torch replaces its interpolation there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        model = segmenter(side=64, patch=16).to("meta")
        encoded = [torch.randn(2, 32, 4, 4, device="meta", requires_grad=True) for _ in range(4)]
        with Called() as called:  # the encoder is that of pre-training
            maps = model.neck(encoded)
            masks = torch.zeros(2, 64, 64, dtype=torch.uint8, device="meta")
            (pixel_loss(model.head(maps), masks) + pixel_loss(model.auxiliary(maps[2]), masks)).backward()
    finally:
        torch.use_deterministic_algorithms(before)
    refused = {"nll_loss2d_forward", "_adaptive_avg_pool2d_backward", "upsample_bilinear2d_backward", "put", "cumsum"}
    assert called.names & refused == set()
    assert {"convolution_backward", "max_pool2d_with_indices_backward", "gather"} <= called.names


def test_every_parameter_learns() -> None:
    """ZeRO waits for a gradient of each."""
    model = segmenter()
    logits, auxiliary = model(torch.randn(2, 3, 32, 32))
    assert (logits.shape, auxiliary.shape) == ((2, 3, 8, 8), (2, 3, 2, 2))
    (F.cross_entropy(logits, torch.zeros(2, 8, 8, dtype=torch.long)) + auxiliary.square().mean()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert silent == []
    assert isinstance(model.eval()(torch.randn(1, 3, 32, 32)), torch.Tensor)


def test_pyramid_is_the_blocks_own_output() -> None:
    """Maps are patch tokens after the block, in raster order, without the final norm and the cls token."""
    encoder = segmenter().encoder.eval()
    seen: list[torch.Tensor] = []
    for layer in encoder.layers:
        encoder.blocks[layer].register_forward_hook(lambda module, arguments, output: seen.append(output))
    maps = encoder(torch.randn(2, 3, 32, 32))
    for one, tokens in zip(maps, seen, strict=True):
        assert torch.equal(one, tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


def test_learning_rates_fall_from_the_heads_to_the_embedding() -> None:
    groups = layer_decay_groups(segmenter().named_parameters(), 0.05, 0.5, 4, prefix="encoder.")
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert (
        scale["head.classifier.weight"] == scale["auxiliary.classifier.weight"] == scale["neck.steps.0.0.weight"] == 1
    )
    assert [scale[f"encoder.blocks.{i}.attn.qkv.weight"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert scale["encoder.patch_embed.proj.weight"] == scale["encoder.pos_embed"] == 0.5**5
    assert decay["encoder.pos_embed"] == decay["encoder.cls_token"] == decay["head.classifier.bias"] == 0
    assert decay["head.classifier.weight"] == 0.05


@settings(deadline=None, max_examples=20)
@given(
    batch=st.integers(2, 4),
    channels=st.integers(1, 5),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    shared=st.booleans(),
)
def test_batch_norm_of_maps_is_torchs(batch: int, channels: int, height: int, width: int, shared: bool) -> None:
    ours, theirs = HeadBatchNorm(channels), torch.nn.BatchNorm2d(channels)
    if shared:
        ours.all_reduce_sum = lambda x: x  # one rank: sums are its own
    x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    for name, value in theirs.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_shallow_encoders_give_four_maps(depth: int) -> None:
    encoder = PyramidViT(Model(image_size=16, patch_size=8, width=16, depth=depth, heads=2), pyramid_layers(depth))
    assert [tuple(one.shape) for one in encoder(torch.randn(1, 3, 16, 16))] == [(1, 16, 2, 2)] * 4
