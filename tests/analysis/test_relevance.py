"""Relevance finds what the feature was made of."""

import numpy as np
import pytest
import torch
from torch import nn

from lut_ds.analysis import relevance
from lut_ds.analysis.figures import LIGHT
from lut_ds.analysis.relevance import class_target
from tests.analysis.models import small_vit, subject

PATCHES = 16


def reader():
    """A model whose patches all attend to the brightest one and copy it: channel 0 is brightness, channels 1 to 3 the colours."""
    model = small_vit(embed_dim=4, num_heads=1, depth=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for channel in range(3):
            model.patch_embed.proj.weight[0, channel] = 1 / 48
            model.patch_embed.proj.weight[1 + channel, channel] = 1 / 16
        for block in model.blocks:
            block.norm1, block.norm2 = nn.Identity(), nn.Identity()
            block.attn.qkv.bias[0] = 30.0  # every query asks for brightness
            block.attn.qkv.weight[4:].copy_(torch.eye(4).repeat(2, 1))
            block.attn.proj.weight.copy_(torch.eye(4))
        model.norm = nn.Identity()
    return model


def planted(count=12):
    """Dark images with one bright patch each: red in class 0, green in class 1; and where it is."""
    pixels = torch.full((count, 16, 16, 3), 128, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    places = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(0))[:count]
    for image, (label, place) in enumerate(zip(labels.tolist(), places.tolist(), strict=True)):
        row, column = divmod(place, 4)
        pixels[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4, label] = 255
    return pixels, labels, places


@pytest.mark.parametrize("labelled", [True, False])
def test_a_planted_patch_is_found(labelled):
    pixels, labels, places = planted()
    shown = subject(reader(), images=12, labels=labels if labelled else None)
    shown.pixels.copy_(pixels)
    if not labelled:
        shown.pixels[0] = 128  # an image without anything in it, so that the others differ from the mean
    found = relevance.measure(shown, pools_patches=True)
    assert found.numbers["target"] == ("class" if labelled else "norm")
    maps = found.arrays["maps"].reshape(-1, PATCHES)
    for heat, place in list(zip(maps, places.tolist(), strict=False))[0 if labelled else 1 :]:
        assert heat.argmax() == place
        assert heat[place] > 5 * np.delete(heat, place).max()
    left = found.numbers["target_left"]
    assert left["most"] < 0.3 < left["random"] < left["least"] + 1e-6
    assert left["least"] > 0.9


def test_the_class_target_leaves_the_image_itself_out():
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0]])
    mean, others = class_target(features, torch.tensor([5, 5, 0, 0]))
    assert mean.tolist() == [1.0, 1.5]
    assert others.tolist() == [[3.0, 0.0], [1.0, 0.0], [0.0, 4.0], [0.0, 2.0]]
    assert class_target(features, torch.tensor([0, 0, 0, 1])) is None


def test_the_parameters_are_left_as_they_were_and_two_models_share_a_figure():
    shown = subject(small_vit(), images=9)
    for parameter in shown.model.parameters():
        parameter.requires_grad_(False)
    found = relevance.measure(shown, pools_patches=False)
    assert all(parameter.grad is None for parameter in shown.model.parameters())
    words = {
        text.get_text() for axis in relevance.draw(LIGHT, [("a", found), ("b", found)]).axes for text in axis.texts
    }
    assert {"input", "relevance", "a", "b"} <= words
