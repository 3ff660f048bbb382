"""The order of samples: a permutation of each epoch that is computed, not stored."""

import math

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.rng import STREAM_ORDER, uniforms

_ROUNDS = 8


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection of 64-bit words; each input bit flips half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleOrder:
    """A global shuffle of `n` samples for every epoch, in O(1) memory: (seed, epoch, position) -> sample.

    A Feistel network over pairs (left, right) with left < a, right < b, a * b >= n and a * b - n < a; values that fall
    outside [0, n) walk along the permutation's cycle until they are inside, which keeps it a bijection of [0, n).
    """

    def __init__(self, n: int, seed: int) -> None:
        if not 1 <= n < 1 << 48:
            raise ValueError(f"SampleOrder: n must be in [1, 2**48), found {n}")
        self.n = n
        self.seed = seed
        self._left = math.isqrt(n - 1) + 1
        self._right = -(-n // self._left)

    def samples(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at int64 `positions` [m] (each in [0, n)) of the epoch: int64 [m]; every sample once an epoch."""
        positions = np.asarray(positions, np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.n):
            raise ValueError(f"SampleOrder: positions must be in [0, {self.n})")
        keys = self._round_keys(epoch)
        values = self._permute(positions.astype(np.uint64), keys)
        outside = values >= self.n
        while outside.any():
            values[outside] = self._permute(values[outside], keys)
            outside = values >= self.n
        return values.astype(np.int64)

    def _round_keys(self, epoch: int) -> NDArray[np.uint64]:
        draws = uniforms(self.seed, epoch, np.zeros(1, np.int64), STREAM_ORDER, _ROUNDS)[0]
        return _mix((draws * 2.0**53).astype(np.uint64))

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = np.uint64(self._left), np.uint64(self._right)
        left, right = values // b, values % b
        for i, key in enumerate(keys):
            if i % 2 == 0:
                left = (left + _mix(right ^ key) % a) % a
            else:
                right = (right + _mix(left ^ key) % b) % b
        return left * b + right
