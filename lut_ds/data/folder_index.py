"""An image folder listed once: listing 100 million files on shared storage takes hours, mapping their index does not."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lut_ds.data.files import IndexedFiles
from lut_ds.data.folder import directories, layout, listing, split_root
from lut_ds.data.index import INDEX_NAME, SampleIndex
from lut_ds.data.index_writer import IndexWriter
from lut_ds.data.shard_index import Progress, stored_root
from lut_ds.errors import UserError

_FOLDERS_LOOKED_AT = 64


def write_folder_index(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    split: Literal["train", "val"] | None = "train",
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """List the images of a folder (as ImageFolder does, in its order) into `out`, by default index.lut in that folder.

    Files are not opened and their sizes not looked up. Interrupted, it leaves nothing behind.

    Returns:
        index (its path), folders, samples, classes.

    Raises:
        UserError: the folder does not work as an ImageFolder, or `out` cannot be written.
    """
    root = split_root(Path(path), split)
    folders, images = layout(root)
    out = root / INDEX_NAME if out is None else Path(out)
    with IndexWriter(out, "files", stored_root(root, out)) as writer:
        if images:
            _append(writer, os.fsencode(root), b"", images, -1)
        for label, name in enumerate(folders):
            for folder, found in directories(os.fsencode(root), name):
                _append(writer, os.fsencode(root), folder, found, label)
                if progress is not None:
                    progress(len(writer), 0)
        writer.finish([os.fsdecode(name) for name in folders])
        return {"index": str(out), "folders": writer.shard_count, "samples": len(writer), "classes": len(folders)}


def _append(writer: IndexWriter, root: bytes, folder: bytes, images: list[bytes], label: int) -> None:
    shard = writer.add_shard(folder, len(images), os.stat(os.path.join(root, folder)).st_mtime_ns)
    for name in images:
        writer.append(name, shard, label=label)


def check_fresh(source: IndexedFiles) -> None:
    """Whether the files of an index are still there, at a price that does not grow with their number.

    Looked at are 16 files and 64 folders, spread evenly: the files must exist, and a folder that was changed since it was
    listed must hold as many images as it did. UserError, with the command that writes the index again, otherwise. What
    changed elsewhere is found when it is read.
    """
    index = source.index
    if not index.root.is_dir():
        raise UserError(
            f"index {index.path}: expected the images in {index.root}, found no such folder; move them there, or write the "
            "index again with `lut-ds data index`"
        )
    i = source.missing()
    if i is not None:
        raise _stale(index, source.name(i), "an image", "nothing")
    for k in _spread(index.shard_count):
        shard = index.shard(k)
        folder = os.path.join(os.fsencode(index.root), index.shard_name(k))
        if (
            shard.size < 0
            or not shard.name
            or (os.path.isdir(folder) and os.stat(folder).st_mtime_ns == shard.mtime_ns)
        ):
            continue  # the root itself always changes: it holds the index
        images = len(listing(folder)[1])
        if images != shard.size:
            raise _stale(index, os.fsdecode(folder), f"{shard.size} images", str(images))


def _spread(count: int) -> Iterator[int]:
    yield from np.unique(np.linspace(0, count - 1, min(count, _FOLDERS_LOOKED_AT)).astype(int)).tolist()


def _stale(index: SampleIndex, where: str, expected: str, found: str) -> UserError:
    return UserError(
        f"data.path: {where}: expected {expected} as {index.path} has it, found {found}: the folder changed; write the index "
        "again with `lut-ds data index`, or delete it"
    )
