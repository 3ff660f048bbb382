"""Training and validation images with labels, checked before anything is computed from them."""

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.sources import Source, open_source
from lut_ds.errors import UserError


def open_labelled(path: str) -> tuple[Source, Source]:
    """The sets `train` and `val` of a data path, with the same classes, each of which has images in both.

    Raises:
        UserError: no such sets, no labels, other classes in the two, a label outside of them, or a class without images.
    """
    train, val = open_source(path, "train"), open_source(path, "val")
    check_labelled(train, val, path)
    return train, val


def check_labelled(train: Source, val: Source, path: str) -> None:
    """UserError unless both sources have the same classes, and images of each."""
    if not train.classes:
        raise UserError(f"data: {path}: expected images in class folders, found no labels; put them in train/<class>/")
    if train.classes != val.classes:
        strange = sorted(set(train.classes) ^ set(val.classes))
        name = strange[0] if strange else "another order"
        where = "train" if name in train.classes else "val"
        raise UserError(
            f"data: {path}: expected the same classes in train and val, found {name!r} in {where} alone "
            f"({len(train.classes)} and {len(val.classes)} classes, {len(strange)} differ); make both sets alike"
        )
    for split, source in (("train", train), ("val", val)):
        check_labels(labels_of(source), source, f"{path}: {split}")


def labels_of(source: Source) -> NDArray[np.int64]:
    """The class index of every image: int64 [N]."""
    return np.fromiter((source.label(i) for i in range(len(source))), np.int64, len(source))


def check_labels(labels: NDArray[np.int64], source: Source, where: str) -> None:
    """UserError unless every label is one of the source's classes, and every class occurs."""
    count = len(source.classes)
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if len(outside):
        first = int(outside[0])
        raise UserError(
            f"data: {where}: expected labels from 0 to {count - 1}, found {labels[first]} at {source.name(first)} "
            f"({len(outside)} images); correct the labels"
        )
    empty = np.flatnonzero(np.bincount(labels, minlength=count) == 0)
    if len(empty):
        raise UserError(
            f"data: {where}: expected images of each of {count} classes, found none of {source.classes[int(empty[0])]!r} "
            f"({len(empty)} empty); add images, or remove the class from both sets"
        )
