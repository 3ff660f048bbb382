"""ImageNet's classes and the subsets that other test sets have of them, as timm ships them."""

import functools
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from lut_ds.errors import UserError

Groups = NDArray[np.int64]
"""[G, m]: columns of the logits whose highest is the score of class g; rows with fewer repeat one of theirs."""


@functools.cache
def synsets(subset: str = "") -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1k, in the order of every published classifier; of `a` or `r`: those of ImageNet-A or -R."""
    name = f"imagenet_{subset}_synsets.txt" if subset else "imagenet_synsets.txt"
    return tuple(files("timm.data").joinpath("_info", name).read_text().split())


def imagenet_columns(classes: Sequence[str], count: int, where: str) -> dict[str, int]:
    """The column of each of ImageNet's classes in a classifier's logits.

    Args:
        classes: the classifier's, by column; empty where it does not say, which with 1000 means the published order.
        count: of columns.
        where: names the set in the error.

    Raises:
        UserError: the classifier has other classes.
    """
    known = synsets()
    if count == len(known) and set(classes) in (set(), set(known)):
        return {name: column for column, name in enumerate(classes or known)}
    found = f"{count} ({', '.join(classes[:3])}...)" if classes else str(count)
    raise UserError(
        f"--sets: {where}: expected a checkpoint with ImageNet's 1000 classes, found one with {found}; "
        "name a classifier of ImageNet, or leave this set out"
    )


def one_each(columns: Sequence[int]) -> Groups:
    """Classes with a column each."""
    return np.array(columns, np.int64)[:, None]


def grouped(columns: Sequence[Sequence[int]]) -> Groups:
    """Classes with one or more columns each."""
    most = max(map(len, columns))
    return np.array([[*group, *[group[0]] * (most - len(group))] for group in columns], np.int64)
