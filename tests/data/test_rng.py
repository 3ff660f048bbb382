"""The counter-based generator: published vectors, ranges, and that nothing but the arguments matters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lut_ds.data.rng import philox4x32, uniforms, uniforms32

# Known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = words(key)
    found = philox4x32(np.array(words(counter), np.uint64)[:, None], (k0, k1))
    assert found[:, 0].tolist() == words(expected)


@given(
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 2**32 - 1),
    samples=st.lists(st.integers(0, 2**62), min_size=1, max_size=20),
    stream=st.integers(0, 4095),
    count=st.integers(1, 40),
)
def test_each_draw_depends_on_its_own_key_only(
    seed: int, epoch: int, samples: list[int], stream: int, count: int
) -> None:
    together = uniforms(seed, epoch, np.array(samples), stream, count)
    assert together.shape == (len(samples), count)
    assert together.min() >= 0
    assert together.max() < 1
    alone = uniforms(seed, epoch, np.array(samples[-1:]), stream, count)
    assert np.array_equal(alone[0], together[-1])
    fewer = uniforms(seed, epoch, np.array(samples), stream, 1)
    assert np.array_equal(fewer[:, 0], together[:, 0])


@pytest.mark.parametrize("change", ["seed", "epoch", "sample", "stream"])
def test_any_part_of_the_key_changes_the_draw(change: str) -> None:
    base = {"seed": 3, "epoch": 1, "sample": 5, "stream": 2}
    other = base | {change: base[change] + 1}
    draws = [uniforms(k["seed"], k["epoch"], np.array([k["sample"]]), k["stream"], 8) for k in (base, other)]
    assert not np.isin(draws[0], draws[1]).any()


@pytest.mark.parametrize("draw", [uniforms, uniforms32])
def test_draws_are_uniform_and_uncorrelated(draw) -> None:
    u = draw(7, 0, np.arange(20000), 4, 6)
    assert u.dtype == (np.float64 if draw is uniforms else np.float32)
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    expected = u.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-square, 19 degrees: p = 1e-4
    assert np.abs(np.corrcoef(u.T) - np.eye(6)).max() < 0.04
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.04


def test_out_of_range_arguments() -> None:
    with pytest.raises(ValueError, match="stream"):
        uniforms(0, 0, np.arange(1), 4096, 1)
    with pytest.raises(ValueError, match="epoch"):
        uniforms(0, -1, np.arange(1), 0, 1)
