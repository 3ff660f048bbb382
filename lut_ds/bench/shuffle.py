"""How random an order is, in numbers: against a global shuffle, for data that is sorted by class."""

import numpy as np

from lut_ds.data.order import Order

_LOOKED_AT = 20_000  # neighbouring positions
_BATCHES = 32
_STRETCH = 1024


def shuffle_quality(order: Order, classes: int, batch: int, epoch: int = 0) -> dict[str, float]:
    """Measure an order over samples whose class is sample * classes // n, in batches of `batch`.

    Returns:
        rank_correlation: of position and sample over the epoch; 0 when the order says nothing about where a sample lies.
        neighbour_distance: mean distance of samples at neighbouring positions, over n; 1/3 for independent draws.
        classes_in_batch: mean number of different classes.
        class_imbalance: mean total variation distance between the classes of a batch and all classes; in [0, 1].
        repeated_pairs: of the pairs of samples that share a batch in one epoch, the share that does again in the next,
            over what chance gives; 1 for independent epochs.
        touched: mean share of the data set, in stretches of 1,024 neighbours, that a batch reads from.
    """
    n = order.n
    spread = np.linspace(0, n - 1, min(n, _LOOKED_AT)).astype(np.int64)
    start = (n - min(n, _LOOKED_AT)) // 2
    neighbours = order.samples(epoch, np.arange(start, start + min(n, _LOOKED_AT)))
    count = min(n // batch, _BATCHES)
    firsts = np.linspace(0, n // batch - 1, count).astype(np.int64) * batch
    batches = order.samples(epoch, (firsts[:, None] + np.arange(batch)).ravel()).reshape(count, batch)
    labels = batches * classes // n
    counts = np.stack([np.bincount(row, minlength=classes) for row in labels])
    return {
        "rank_correlation": float(np.corrcoef(spread, order.samples(epoch, spread))[0, 1]),
        "neighbour_distance": float(np.abs(np.diff(neighbours)).mean() / n),
        "classes_in_batch": float((counts > 0).sum(axis=1).mean()),
        "class_imbalance": float(np.abs(counts / batch - 1 / classes).sum(axis=1).mean() / 2),
        "repeated_pairs": _repeated_pairs(order, batch, epoch),
        "touched": float(np.mean([len(np.unique(row // _STRETCH)) for row in batches]) / -(-n // _STRETCH)),
    }


def _repeated_pairs(order: Order, batch: int, epoch: int) -> float:
    """See shuffle_quality: how much more often than by chance two samples of one batch share the next epoch's batch."""
    whole = order.n // batch * batch
    where = np.full(order.n, -1, np.int64)
    where[order.samples(epoch + 1, np.arange(whole))] = np.arange(whole) // batch
    rng = np.random.default_rng(0)
    first = rng.integers(0, whole, 1_000_000)
    second = first // batch * batch + rng.integers(0, batch, len(first))
    positions = np.unique(np.concatenate([first, second]))
    samples = order.samples(epoch, positions)
    a, b = (where[samples[np.searchsorted(positions, p)]] for p in (first, second))
    other = (first != second) & (a >= 0) & (b >= 0)
    return float((a[other] == b[other]).mean() / ((batch - 1) / (order.n - 1)))
