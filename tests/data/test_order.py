"""The sample order: a permutation every epoch, another one each time, computed for any positions alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_ds.bench.shuffle import shuffle_quality
from lut_ds.data.order import BlockOrder, SampleOrder


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


@given(
    n=st.integers(1, 1500),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 10**6),
    block=st.integers(1, 300) | st.integers(1, 2**70),
    window=st.integers(1, 20) | st.integers(1, 2**70),
)
@settings(deadline=None, max_examples=60)
def test_blocks_every_sample_exactly_once(n: int, seed: int, epoch: int, block: int, window: int) -> None:
    order = BlockOrder(n, seed, block, window)
    samples = order.samples(epoch, np.arange(n))
    assert np.array_equal(np.sort(samples), np.arange(n))
    some = np.arange(n)[:: max(1, n // 7)][::-1]
    assert np.array_equal(order.samples(epoch, some), samples[some])  # nothing but the position counts


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 1000))
def test_blocks_come_from_few_places_at_a_time(seed: int, epoch: int) -> None:
    """A window of 8 blocks of 16 samples: 128 positions whose samples are 8 runs of 16 neighbours on the circle."""
    n, block, window = 10_007, 16, 8
    order = BlockOrder(n, seed, block, window)
    first = block * window * 5
    samples = np.sort(order.samples(epoch, np.arange(first, first + block * window)))
    starts = samples[~np.isin((samples - 1) % n, samples)]
    assert len(starts) <= window
    assert len(samples) == len(np.unique(samples)) == block * window


def test_blocks_differ_by_epoch_and_seed_and_are_cut_anew() -> None:
    n = 5000
    orders = [BlockOrder(n, seed, 64, 8).samples(epoch, np.arange(n)) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        assert all((a == b).mean() < 0.02 for b in orders[:i])
    dropped = [set(BlockOrder(n, 0, 64, 8).samples(epoch, np.arange(n - 8, n)).tolist()) for epoch in range(20)]
    assert len(set.union(*dropped)) > 100  # the incomplete last batch is not made of the same samples again and again


def test_blocks_at_any_size_and_position() -> None:
    order = BlockOrder(10**9 + 7, 3, 1024, 64)
    positions = np.array([0, 1, 65_535, 65_536, 10**9 + 6])
    samples = order.samples(2, positions)
    assert samples.min() >= 0
    assert samples.max() < order.n
    assert len(np.unique(samples)) == 5
    for position, sample in zip(positions, samples):
        assert order.samples(2, np.array([position])) == sample
    with pytest.raises(ValueError, match="positions"):
        order.samples(0, np.array([order.n]))
    with pytest.raises(ValueError, match="must be positive"):
        BlockOrder(10, 0, 0, 1)


def test_quality_against_the_global_shuffle() -> None:
    """100,000 samples sorted by 100 classes, batches of 512; chance gives 99.4 classes a batch and an imbalance of .18."""
    n, classes, batch = 100_000, 100, 512
    full = shuffle_quality(SampleOrder(n, 0), classes, batch)
    blocks = shuffle_quality(BlockOrder(n, 0, 64, 128), classes, batch)
    assert abs(full["rank_correlation"]) < 0.03
    assert abs(full["neighbour_distance"] - 1 / 3) < 0.01
    assert full["classes_in_batch"] > 98
    assert full["class_imbalance"] < 0.2
    assert abs(full["repeated_pairs"] - 1) < 0.2
    assert full["touched"] > 0.95
    assert abs(blocks["rank_correlation"]) < 0.2  # 12 windows in random order
    assert abs(blocks["neighbour_distance"] - 1 / 3) < 0.05
    assert 60 < blocks["classes_in_batch"] < 85  # 128 draws of 100 classes hit 72
    assert 0.2 < blocks["class_imbalance"] < 0.5
    assert 0.9 < blocks["repeated_pairs"] < 3
