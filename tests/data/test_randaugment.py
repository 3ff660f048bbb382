"""RandAugment and random erasing: timm's pixels for the same draws, and draws that depend on (seed, epoch, sample) alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from lut_ds.data.erasing import draw_erasures, erase_
from lut_ds.data.randaugment import (
    OPERATORS,
    RandAugment,
    apply_randaugment,
    arguments,
    draw_randaugment,
    parse_randaugment,
)
from tests.data.images import photo

FILL = (124, 116, 104)
PUBLISHED = "rand-m9-mstd0.5-inc1"


def test_operators_are_timms() -> None:
    reference = rand_augment_transform(PUBLISHED, {"translate_const": 100, "img_mean": FILL})
    assert tuple(op.name for op in reference.ops) == OPERATORS
    assert parse_randaugment(PUBLISHED) == RandAugment(9.0, 0.5, reference.num_layers, reference.ops[0].prob)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("level", [0.0, 4.4, 9.0, 10.0])
def test_pixels_are_timms(name: str, level: float) -> None:
    picture = photo(32, 32, seed=3)
    settings = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    for seed in (0, 1):  # one draws above one half, the other below
        random.seed(seed)
        negate = random.random() > 0.5
        random.seed(seed)
        if (name, level) == (
            "PosterizeIncreasing",
            10.0,
        ):  # no bits are left: timm's operator fails with today's Pillow
            expected = np.zeros((32, 32, 3), np.uint8)
        else:
            expected = np.asarray(AugmentOp(name, 1.0, level, settings)(picture))
        found = apply_randaugment(np.asarray(picture), [(name, arguments(name, level, negate))], FILL)
        np.testing.assert_array_equal(found, expected)


def test_draws_are_spread_as_timms() -> None:
    drawn = draw_randaugment(RandAugment(9.0, 0.5), 0, 0, np.arange(4000))
    counts = np.bincount([len(operators) for operators in drawn], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.25, 0.5, 0.25], atol=0.03)
    names = [name for operators in drawn for name, _ in operators]
    np.testing.assert_allclose([names.count(name) * 15 / len(names) for name in OPERATORS], 1, atol=0.25)
    angles = np.array([values[0] for operators in drawn for name, values in operators if name == "Rotate"])
    assert abs((angles > 0).mean() - 0.5) < 0.12
    assert np.abs(angles).mean() == pytest.approx(27, abs=0.5)
    assert np.abs(angles).max() <= 30
    assert 1.0 < np.abs(angles).std() < 1.8


def test_draws_are_a_function_of_the_sample() -> None:
    settings = RandAugment(9.0, 0.5)
    together = draw_randaugment(settings, 7, 2, np.array([5, 900, 31]))
    assert [draw_randaugment(settings, 7, 2, np.array([i]))[0] for i in (5, 900, 31)] == together
    assert draw_randaugment(settings, 7, 3, np.array([5, 900, 31])) != together
    alone = draw_erasures(1.0, 32, 7, 2, np.array([31]))[0]
    same = draw_erasures(1.0, 32, 7, 2, np.array([5, 900, 31]))[2]
    assert (alone.top, alone.left) == (same.top, same.left)
    assert torch.equal(alone.noise, same.noise)


@pytest.mark.parametrize("text", ["rand-m9", "rand-m11-inc1", "auto-m9-inc1", "rand-m9-w0-inc1", "rand-m9-n0-inc1", ""])
def test_other_notations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected (rand-m|n of)"):
        parse_randaugment(text)


def test_erasures_are_as_often_and_as_large_as_said() -> None:
    side, samples = 64, np.arange(3000)
    found = draw_erasures(0.25, side, 1, 0, samples)
    assert len(found) / 3000 == pytest.approx(0.25, abs=0.03)
    for e in found:
        _, h, w = e.noise.shape
        assert 0 <= e.top <= side - h
        assert 0 <= e.left <= side - w
        assert 0.26 < h / w < 3.8
    areas = [e.noise[0].numel() / side**2 for e in found]
    assert 0.015 < min(areas) < max(areas) < 0.35
    assert not draw_erasures(0.0, side, 1, 0, samples)
    images = torch.zeros((4, 3, side, side))
    first = draw_erasures(1.0, side, 1, 0, samples[:4])
    erase_(images, first[1:3])
    assert [bool(image.any()) for image in images] == [False, True, True, False]
    noise = images[1][:, first[1].top : first[1].top + first[1].noise.shape[1]]
    assert noise[noise != 0].std().item() == pytest.approx(1, abs=0.2)
