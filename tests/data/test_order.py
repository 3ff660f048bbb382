"""The sample order: a permutation every epoch, another one each time, computed for any positions alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lut_ds.data.order import SampleOrder


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**6))
def test_every_sample_exactly_once(n: int, seed: int, epoch: int) -> None:
    samples = SampleOrder(n, seed).samples(epoch, np.arange(n))
    assert samples.dtype == np.int64
    assert np.array_equal(np.sort(samples), np.arange(n))


@given(
    n=st.integers(1, 10**9),
    seed=st.integers(0, 2**32),
    positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=50, unique=True),
)
def test_large_sets_at_any_positions(n: int, seed: int, positions: list[int]) -> None:
    inside = np.unique(np.array(positions) % n)
    order = SampleOrder(n, seed)
    samples = order.samples(3, inside)
    assert samples.min() >= 0
    assert samples.max() < n
    assert len(np.unique(samples)) == len(inside)
    assert np.array_equal(samples[-1:], order.samples(3, inside[-1:]))


def test_epochs_and_seeds_differ() -> None:
    positions = np.arange(1000)
    orders = [SampleOrder(1000, seed).samples(epoch, positions) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        assert (a == positions).mean() < 0.02
        for b in orders[:i]:
            assert (a == b).mean() < 0.02


def test_small_orders_are_all_equally_likely() -> None:
    seen = Counter(tuple(SampleOrder(4, seed).samples(0, np.arange(4))) for seed in range(2400))
    assert len(seen) == 24
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 60  # chi-square, 23 degrees: p = 4e-5


def test_neighbours_are_scattered() -> None:
    n = 10**6
    samples = SampleOrder(n, 0).samples(0, np.arange(2000))
    assert abs(np.abs(np.diff(samples)).mean() / n - 1 / 3) < 0.03  # two uniform draws are a third apart
    assert np.abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.1


def test_positions_out_of_range() -> None:
    with pytest.raises(ValueError, match="positions"):
        SampleOrder(10, 0).samples(0, np.array([10]))
    with pytest.raises(ValueError, match="n must be"):
        SampleOrder(0, 0)
