"""Sources of one file a sample: what image folders, list files and indexes of both have in common."""

import os
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lut_ds.data.index import SampleIndex
from lut_ds.errors import RunFault, UserError

_LOOKED_AT = 16  # files, spread evenly: what opening a source may cost on shared storage


class FileSource(ABC):
    """One file a sample: subclasses say where; `read` may be called from any number of threads."""

    classes: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def path(self, i: int) -> bytes:
        """The path of file `i`, as the file system's bytes; IndexError outside of [0, len)."""

    @abstractmethod
    def label(self, i: int) -> int:
        """The class index of file `i`, -1 without one."""

    def read(self, i: int) -> bytes:
        """The bytes of file `i`; RunFault naming the file when it cannot be read."""
        try:
            with open(self.path(i), "rb", buffering=0) as file:
                return file.readall()
        except OSError as error:
            raise RunFault(f"data: {self.name(i)}: cannot be read: {error.strerror or error}") from error

    def name(self, i: int) -> str:
        """The path of file `i`."""
        return os.fsdecode(self.path(i))

    def missing(self) -> int | None:
        """The first of 16 files, spread evenly over the set, that does not exist; None when all do."""
        spread = {round(i * (len(self) - 1) / (_LOOKED_AT - 1)) for i in range(_LOOKED_AT)}
        return next((i for i in sorted(spread) if not os.path.lexists(self.path(i))), None)


class PathTable(FileSource):
    """Paths in memory, as one blob of bytes with offsets: 12 bytes a file besides its path."""

    def __init__(self, root: str | os.PathLike[str], paths: list[bytes], labels: ArrayLike, classes: list[str]) -> None:
        self.classes = classes
        self._labels: NDArray[np.int32] = np.asarray(labels, np.int32)
        self._offsets = np.zeros(len(paths) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, paths), np.int64, len(paths)), out=self._offsets[1:])
        self._blob = b"".join(paths)
        self._root = os.fsencode(root)

    def __len__(self) -> int:
        return len(self._labels)

    def entry(self, i: int) -> bytes:
        """The path of file `i` as it was given: mostly relative to the root."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self._blob[self._offsets[i] : self._offsets[i + 1]]

    def path(self, i: int) -> bytes:
        """See FileSource."""
        return os.path.join(self._root, self.entry(i))

    def label(self, i: int) -> int:
        """See FileSource."""
        return int(self._labels[i])


class IndexedFiles(FileSource):
    """Files through an index: opened without listing a folder; shared between processes (see index.py).

    Whether the files are still there is `folder_index.check_fresh`'s question.
    """

    def __init__(self, index: SampleIndex) -> None:
        if index.kind != "files":
            raise UserError(f"index {index.path}: expected an index of files, found one of tar shards; open it as such")
        self.index, self.classes = index, index.classes
        self._root = os.fsencode(index.root)
        self._labels = index.labels()

    def __len__(self) -> int:
        return len(self.index)

    def path(self, i: int) -> bytes:
        """See FileSource."""
        name = self.index.name(i)
        return os.path.join(self._root, self.index.shard_name(self.index.place(i)[3]), name)

    def label(self, i: int) -> int:
        """See FileSource."""
        return int(self._labels[i])
