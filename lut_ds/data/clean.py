"""An index of some samples of a source: what is left once the unusable ones are out."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.files import FileSource
from lut_ds.data.index import SampleIndex
from lut_ds.data.index_writer import IndexWriter
from lut_ds.data.sources import Source


def write_subset(path: Path, source: Source, keep: NDArray[np.bool_]) -> bool:
    """Write an index with the samples of `source` where bool `keep` [n]; order, labels and classes stay as they are.

    False, and nothing written, for a source that is neither files nor indexed shards. The index names the place of the
    data absolutely, as it does not lie beside them.
    """
    index = getattr(source, "index", None)
    if isinstance(index, SampleIndex):
        _copy(index, path, keep)
    elif isinstance(source, FileSource):
        _from_files(source, path, keep)
    else:
        return False
    return True


def _copy(index: SampleIndex, path: Path, keep: NDArray[np.bool_]) -> None:
    with IndexWriter(path, index.kind, index.root.absolute()) as writer:
        for k in range(index.shard_count):
            shard = index.shard(k)
            # Reading a shard compares its bytes; with no time of change the index is known as a selection.
            writer.add_shard(index.shard_name(k), shard.size if index.kind == "tar" else -1)
        for i in np.flatnonzero(keep).tolist():
            offset, size, label, shard_number = index.place(i)
            writer.append(index.name(i), shard_number, size, label, offset)
        writer.finish(index.classes)


def _from_files(source: FileSource, path: Path, keep: NDArray[np.bool_]) -> None:
    folders: dict[bytes, int] = {}
    with IndexWriter(path, "files", os.sep) as writer:
        for i in np.flatnonzero(keep).tolist():
            folder, name = os.path.split(os.path.abspath(source.path(i)))
            folder = folder[1:]
            if folder not in folders:
                folders[folder] = writer.add_shard(folder)
            writer.append(name, folders[folder], label=source.label(i))
        writer.finish(source.classes)
