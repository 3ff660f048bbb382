"""What is odd about the folders of an image folder, without opening a file."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lut_ds.data.classes import CLASSES_NAME
from lut_ds.data.files import FileSource
from lut_ds.data.folder import EXTENSIONS
from lut_ds.data.index import INDEX_NAME
from lut_ds.data.parts import Part

_OURS = (INDEX_NAME.encode(), CLASSES_NAME.encode())


class Finding(NamedTuple):
    """Something that people should know of a sample, file or folder that training uses, or does not see."""

    name: str
    kind: str
    detail: str


def empty_classes(part: Part) -> Iterator[Finding]:
    """The classes without a sample: each is a label that never occurs."""
    seen = np.zeros(len(part.source.classes), bool)
    labels = np.fromiter(map(part.source.label, range(len(part.source))), np.int32, len(part.source))
    seen[labels[labels >= 0]] = True
    for label in np.flatnonzero(~seen).tolist():
        yield Finding(_class_name(part, label), "empty class", "no image in it or below it")


def different_classes(train: Part, val: Part) -> Iterator[Finding]:
    """The classes that only one split has: the labels of the two do not match."""
    for part, other in ((train, val), (val, train)):
        theirs = set(other.source.classes)
        for label, name in enumerate(part.source.classes):
            if name not in theirs:
                yield Finding(_class_name(part, label), "class in one split", f"{other.split} has no class {name}")


def ignored_files(part: Part) -> Iterator[Finding]:
    """Files of an image folder that training does not look at because of their names.

    Left out are names that start with a dot, and our own files.
    """
    if part.folder is None or not isinstance(part.source, FileSource):
        return
    for folder, folders, files in os.walk(os.fsencode(part.folder), followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith(b"."))
        for name in sorted(files):
            if not name.startswith(b".") and not name.lower().endswith(EXTENSIONS) and name not in _OURS:
                extension = os.fsdecode(os.path.splitext(name)[1])
                path = os.fsdecode(os.path.join(folder, name))
                yield Finding(path, "ignored file", f"extension {extension or 'missing'}")


def _class_name(part: Part, label: int) -> str:
    """For an image folder the path of the class, else its name."""
    name = part.source.classes[label]
    return os.path.join(part.folder, name) if part.folder and isinstance(part.source, FileSource) else name
