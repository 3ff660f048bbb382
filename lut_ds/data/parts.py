"""The splits of a data set, and how worker processes open them."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lut_ds.data.clean import write_subset
from lut_ds.data.files import FileSource, IndexedFiles, PathTable
from lut_ds.data.index import SampleIndex
from lut_ds.data.sources import Source, open_source
from lut_ds.errors import UserError

SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
_NAMES = 1 << 20  # at most so many names go into a fingerprint


class Part(NamedTuple):
    """A split of a data set; `first` is its first sample's number among all."""

    split: Literal["train", "val"]
    folder: str | None  # that of the split, where it has one
    source: Source
    first: int

    @property
    def samples(self) -> slice:
        """Its samples among all."""
        return slice(self.first, self.first + len(self.source))


def open_parts(path: str) -> list[Part]:
    """The splits of `path`, in order: train and val of a folder that has both, otherwise what training reads."""
    folders = {split: os.path.join(path, split) for split in SPLITS if os.path.isdir(os.path.join(path, split))}
    parts: list[Part] = []
    first = 0
    for split in SPLITS if len(folders) == len(SPLITS) else SPLITS[:1]:
        source = open_source(path, split)
        parts.append(Part(split, folders.get(split, path if os.path.isdir(path) else None), source, first))
        first += len(source)
    if not first:
        raise UserError(f"{path}: expected samples, found none; check the path")
    return parts


def refuse_inside(out: Path, folder: str | os.PathLike[str] | None, source: Source) -> None:
    """UserError when results would go into the image folder that they are about: there they would be one more class."""
    if folder is None or not isinstance(source, FileSource):
        return
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{out}: expected a folder outside of the images, found one in {folder}; give another folder")


def fingerprint(source: Source) -> str:
    """A digest of classes, number of samples and names (of large sources every so manyth): does it hold the same samples?"""
    digest = hashlib.sha256(json.dumps([len(source), source.classes]).encode())
    for i in range(0, len(source), 1 + len(source) // _NAMES):
        digest.update(b"\0" + os.fsencode(source.name(i)))
    return digest.hexdigest()


def opener(path: str, part: Part, listing: Path) -> Callable[[], Source]:
    """How a worker process opens the source of a part: picklable.

    A folder or list that is held in memory is written to `listing` as an index: workers map it instead of listing again.
    """
    if not isinstance(part.source, PathTable):
        return partial(open_source, path, part.split)
    write_subset(listing, part.source, np.ones(len(part.source), np.bool_))
    return partial(open_listing, listing)


def open_listing(path: Path) -> Source:
    """The files of an index, whether or not they still exist."""
    return IndexedFiles(SampleIndex(path))
