"""Tar shards for the tests of this room, written by Python's own tarfile."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from lut_ds.data.folder import ImageFolder

File = tuple[str, bytes]


def write_tar(path: Path, files: Iterable[File], format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, content), in order."""
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pack(source: ImageFolder, root: Path, shards: int) -> Path:
    """The images of a folder as shards, in its order, with `.cls` files; shard k is 00k.tar."""
    root.mkdir(parents=True, exist_ok=True)
    step = -(-len(source) // shards)
    for k in range(shards):
        files: list[File] = []
        for i in range(k * step, min(len(source), (k + 1) * step)):
            files += [(f"{i:06d}.jpg", source.read(i)), (f"{i:06d}.cls", str(source.label(i)).encode())]
        write_tar(root / f"{k:03d}.tar", files)
    return root
