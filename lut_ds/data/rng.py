"""Counter-based random numbers: every draw is a pure function of (seed, epoch, sample, stream, index).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Nothing has a state, so any rank,
thread or resumed run computes the same draw for the same sample without having drawn what came before.
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10

STREAM_BITS, BLOCK_BITS = 12, 20  # counter word 0 holds both, so streams of one sample never overlap
STREAM_ORDER = 0
STREAM_MASK = 1
STREAM_DEGRADATION = 2
STREAM_BLOCKS, STREAM_WINDOW, STREAM_ROTATION = 3, 4, 5  # of the order that shuffles by blocks
STREAM_RANDAUGMENT, STREAM_ERASING, STREAM_MIXING, STREAM_DROP_PATH = 6, 7, 8, 9  # of fine-tuning


def stream_geometry(view_index: int) -> int:
    """The stream of a view's crop and flip draws."""
    return 16 + 2 * view_index


def stream_photometric(view_index: int) -> int:
    """The stream of a view's colour draws; apart from the geometry's so that neither shifts when the other changes."""
    return 17 + 2 * view_index


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 of uint64 `counter` [4, n] (each word below 2**32) under two 32-bit key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def _words(seed: int, epoch: int, samples: NDArray[np.int64], stream: int, count: int) -> NDArray[np.uint64]:
    """`count` 32-bit words a sample, uint64 [n, count]: key = seed, counter = (stream|block, epoch, sample)."""
    blocks = -(-count // 4)
    if not 0 <= stream < 1 << STREAM_BITS or blocks > 1 << BLOCK_BITS:
        raise ValueError(f"rng: stream {stream} or count {count} out of range")
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"rng: epoch {epoch} out of range")
    n = len(samples)
    sample = np.repeat(samples.astype(np.uint64), blocks)
    counter = np.empty((4, n * blocks), np.uint64)
    counter[0] = np.tile(np.arange(blocks, dtype=np.uint64) | np.uint64(stream << BLOCK_BITS), n)
    counter[1] = epoch
    counter[2] = sample & _LOW
    counter[3] = sample >> _SHIFT
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return words.T.reshape(n, blocks * 4)[:, :count]


def uniforms(seed: int, epoch: int, samples: NDArray[np.int64], stream: int, count: int) -> NDArray[np.float64]:
    """`count` draws for each sample, float64 [n, count], uniform in [0, 1) with 53 bits."""
    words = _words(seed, epoch, samples, stream, 2 * count)
    high, low = words[:, 0::2] >> np.uint64(5), words[:, 1::2] >> np.uint64(6)
    draws: NDArray[np.float64] = (high * np.uint64(1 << 26) + low).astype(np.float64) * 2.0**-53
    return draws


def uniforms32(seed: int, epoch: int, samples: NDArray[np.int64], stream: int, count: int) -> NDArray[np.float32]:
    """`count` draws for each sample, float32 [n, count], uniform in [0, 1) with the 24 bits a float32 can hold."""
    words = _words(seed, epoch, samples, stream, count)
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
