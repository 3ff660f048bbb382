"""Mixup, CutMix and their targets: the values of timm's `Mixup` for the same draws."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from lut_ds.transfer.mixing import Mixing, cut, draw_mixing, mix_images, soft_cross_entropy, soft_targets

SIDE, CLASSES = 24, 7


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((6, 3, SIDE, SIDE), generator=generator)
    return images, torch.randint(CLASSES, (6,), generator=generator)


def timm_draws(seed: int, alpha: float, cutmix: bool) -> Iterator[float]:
    """What timm's Mixup draws from numpy's global generator, in its order."""
    np.random.seed(seed)
    np.random.rand()
    yield float(np.random.beta(alpha, alpha))
    if cutmix:
        yield int(np.random.randint(0, SIDE, size=None))
        yield int(np.random.randint(0, SIDE, size=None))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cutmix", [False, True])
def test_same_as_timm(batch: tuple[torch.Tensor, torch.Tensor], seed: int, cutmix: bool) -> None:
    images, labels = batch
    alpha = 1.0 if cutmix else 0.8
    draws = list(timm_draws(seed, alpha, cutmix))
    mixing = cut(draws[0], int(draws[1]), int(draws[2]), SIDE) if cutmix else Mixing(draws[0])
    reference = Mixup(0.0 if cutmix else alpha, alpha if cutmix else 0.0, label_smoothing=0.1, num_classes=CLASSES)
    np.random.seed(seed)
    expected_images, expected_targets = reference(images.clone(), labels)
    torch.testing.assert_close(mix_images(images, mixing), expected_images)
    torch.testing.assert_close(soft_targets(labels, CLASSES, mixing, 0.1), expected_targets)


def test_losses_are_timms(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    labels = batch[1]
    logits = torch.randn((6, CLASSES), generator=torch.Generator().manual_seed(1))
    plain = soft_targets(labels, CLASSES, Mixing(), 0.1)
    torch.testing.assert_close(soft_cross_entropy(logits, plain), LabelSmoothingCrossEntropy(0.1)(logits, labels))
    mixed = soft_targets(labels, CLASSES, Mixing(0.3), 0.0)
    torch.testing.assert_close(soft_cross_entropy(logits, mixed), SoftTargetCrossEntropy()(logits, mixed))
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(6))


def draws_of(count: int, **settings: float) -> list[Mixing]:
    full = {"mixup": 0.8, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5, **settings}
    return [draw_mixing(np.random.default_rng(i), SIDE, **full) for i in range(count)]


def test_how_often_and_how_much() -> None:
    both = draws_of(2000)
    assert sum(m.box is not None for m in both) / 2000 == pytest.approx(0.5, abs=0.05)
    assert np.mean([m.weight for m in both if m.box is None]) == pytest.approx(0.5, abs=0.03)
    assert np.var([m.weight for m in both if m.box is None]) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)
    for m in both:
        if m.box is not None:
            top, bottom, left, right = m.box
            assert 0 <= top <= bottom <= SIDE
            assert 0 <= left <= right <= SIDE
            assert m.weight == pytest.approx(1 - (bottom - top) * (right - left) / SIDE**2)
    assert all(m.box is None for m in draws_of(200, cutmix=0.0))
    assert all(m.box is not None for m in draws_of(200, mixup=0.0))
    assert all(m == Mixing() for m in draws_of(200, mixup=0.0, cutmix=0.0))
    assert sum(m == Mixing() for m in draws_of(2000, prob=0.25)) / 2000 == pytest.approx(0.75, abs=0.05)
