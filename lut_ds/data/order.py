"""The order of samples: a permutation of each epoch that is computed, not stored."""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.rng import STREAM_BLOCKS, STREAM_ORDER, STREAM_ROTATION, STREAM_WINDOW, uniforms

_ROUNDS = 8


class Order(Protocol):
    """A pure function (seed, epoch, position) -> sample, a bijection of [0, n) in every epoch."""

    n: int

    def samples(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at int64 `positions` [m] (each in [0, n)) of the epoch: int64 [m]; every sample once an epoch."""
        ...


class SampleOrder:
    """A global shuffle of `n` samples for every epoch, in O(1) memory."""

    def __init__(self, n: int, seed: int) -> None:
        _check_size(n)
        self.n, self.seed = n, seed
        self._permutation = _Permutation(n)

    def samples(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See Order; ValueError for a position outside."""
        positions = _inside(positions, self.n)
        return self._permutation(positions, _round_keys(self.seed, epoch, STREAM_ORDER))


class BlockOrder:
    """A shuffle that reads nearly in sequence: less random than SampleOrder, in O(1) memory.

    The samples, as a circle cut anew each epoch, are divided into blocks of `block` neighbours; the blocks are permuted; then
    the samples of every `window` blocks that follow each other are shuffled among themselves (what is left over belongs to
    the last window). So at any time the samples come from `window` places (at the end of an epoch, from fewer than twice as
    many), each read from start to end. A batch mixes `window` blocks: data sorted by class needs a window of many classes, or
    shards that were shuffled when they were written.
    """

    def __init__(self, n: int, seed: int, block: int, window: int) -> None:
        _check_size(n)
        if block < 1 or window < 1:
            raise ValueError(f"BlockOrder: block and window must be positive, found {block} and {window}")
        block = min(block, n)
        window = min(window, n // block)
        self.n, self.seed, self._block, self._window = n, seed, block, window
        self._full = n // block  # whole blocks; the samples after the last one stay there, and another cut moves them
        self._windows = self._full // window
        self._blocks = _Permutation(self._full)
        self._inner = _Permutation(block * window)
        self._last = _Permutation(n - (self._windows - 1) * block * window)

    def samples(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See Order; ValueError for a position outside."""
        positions = _inside(positions, self.n)
        length = self._block * self._window
        windows = np.minimum(positions // length, self._windows - 1)
        mixed = np.empty_like(positions)
        for w in np.unique(windows).tolist():
            here = windows == w
            shuffle = self._last if w == self._windows - 1 else self._inner
            mixed[here] = w * length + shuffle(
                positions[here] - w * length, _round_keys(self.seed, epoch, STREAM_WINDOW, w)
            )
        slots = mixed // self._block
        whole = slots < self._full
        blocks = self._blocks(slots[whole], _round_keys(self.seed, epoch, STREAM_BLOCKS))
        mixed[whole] = blocks * self._block + mixed[whole] % self._block
        return (mixed + self._cut(epoch)) % self.n

    def _cut(self, epoch: int) -> int:
        return int(uniforms(self.seed, epoch, np.zeros(1, np.int64), STREAM_ROTATION, 1)[0, 0] * self.n)


class _Permutation:
    """A keyed permutation of [0, n).

    A Feistel network over pairs (left, right) with left < a, right < b, a * b >= n and a * b - n < a; values that fall
    outside [0, n) walk along the permutation's cycle until they are inside, which keeps it a bijection of [0, n).
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._left = math.isqrt(n - 1) + 1
        self._right = -(-n // self._left)

    def __call__(self, positions: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Where int64 `positions` [m] go under uint64 `keys` [8]: int64 [m]."""
        values = self._permute(positions.astype(np.uint64), keys)
        outside = values >= self.n
        while outside.any():
            values[outside] = self._permute(values[outside], keys)
            outside = values >= self.n
        return values.astype(np.int64)

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = np.uint64(self._left), np.uint64(self._right)
        left, right = values // b, values % b
        for i, key in enumerate(keys):
            if i % 2 == 0:
                left = (left + _mix(right ^ key) % a) % a
            else:
                right = (right + _mix(left ^ key) % b) % b
        return left * b + right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection of 64-bit words; each input bit flips half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int, stream: int, part: int = 0) -> NDArray[np.uint64]:
    """Keys of the Feistel rounds, uint64 [8]; `part` tells permutations of one stream apart."""
    draws = uniforms(seed, epoch, np.array([part], np.int64), stream, _ROUNDS)[0]
    return _mix((draws * 2.0**53).astype(np.uint64))


def _check_size(n: int) -> None:
    if not 1 <= n < 1 << 48:
        raise ValueError(f"order: n must be in [1, 2**48), found {n}")


def _inside(positions: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    positions = np.asarray(positions, np.int64)
    if positions.size and (positions.min() < 0 or positions.max() >= n):
        raise ValueError(f"order: positions must be in [0, {n})")
    return positions
