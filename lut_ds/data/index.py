"""The index of a data set: name, place, size and label of every sample, in a file that is mapped, not parsed.

Layout, little endian: a header of 64 bytes; one record of fixed width for each sample; the start of every 65,536th name; the
names, end to end; the shards (for files: folders) in the same way; a trailer in JSON with the classes and the checksums.
A record is 24 bytes for samples in tar shards and 16 for files, so 100 million samples take 2.4 GB or 1.6 GB and their
names. Opening reads header and trailer only, and the pages that are used are shared between the processes of a machine.
"""

import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lut_ds.errors import UserError

Kind = Literal["tar", "files"]

INDEX_NAME = "index.lut"  # in the folder that it describes
MAGIC, VERSION = b"LUTINDEX", 1
HEADER = struct.Struct(
    "<8sII5Q8x"
)  # magic, version, CRC-32 of the trailer, samples, name bytes, shards, their bytes, trailer
NAME_BLOCK = 1 << 16  # names that share a start: their ends are 32 bits
PLACE = [("size", "<u4"), ("label", "<i4"), ("shard", "<u4"), ("name_end", "<u4")]
RECORDS: dict[str, np.dtype] = {"tar": np.dtype([("offset", "<i8"), *PLACE]), "files": np.dtype(PLACE)}
SHARD = np.dtype([("name_end", "<u8"), ("size", "<i8"), ("mtime_ns", "<i8")])
_TAR_RECORD, _FILE_RECORD, _END = struct.Struct("<qIiI"), struct.Struct("<IiI"), struct.Struct("<I")
_CHUNK = 1 << 24


class Entry(NamedTuple):
    """One sample of an index."""

    name: str  # of the tar member or the file, below its shard
    shard: int
    offset: int  # of the first byte inside the shard; 0 for files
    size: int  # bytes; 0 for files whose size was not looked up
    label: int  # index into the classes, -1 without one


@dataclass(frozen=True)
class Shard:
    """A tar shard, or a folder of files, as it was when the index was written."""

    name: str  # relative to the root of the index
    size: int  # bytes of a tar shard, image files of a folder; -1 unknown
    mtime_ns: int  # -1 unknown: of a selection


def fault(path: Path, expected: str, found: str) -> UserError:
    """What to say about an index that cannot be used."""
    return UserError(f"index {path}: expected {expected}, found {found}; write it again with `lut-ds data index`")


class SampleIndex:
    """An index on disk, opened in O(shards named) time and mapped read-only; any thread may read it.

    Attributes:
        path: the file.
        kind: "tar" (samples inside tar shards) or "files" (one file a sample; shards are their folders).
        root: what the names of shards are relative to.
        classes: names of the labels; empty when there are none.

    Raises:
        UserError: the file is missing, no index, of another version, cut short or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map = _map(self.path)
        if len(self._map) < HEADER.size or self._map[: len(MAGIC)] != MAGIC:
            raise fault(self.path, "an index of lut-ds", f"a file that starts with {bytes(self._map[:8])!r}")
        _, version, crc, count, name_bytes, shards, shard_bytes, trailer_bytes = HEADER.unpack_from(self._map)
        if version != VERSION:
            raise fault(self.path, f"version {VERSION}", f"version {version}")
        trailer = self._trailer(trailer_bytes, crc)
        self.kind: Kind = trailer["kind"]
        self.root = Path(os.path.normpath(self.path.parent / os.fsdecode(bytes.fromhex(trailer["root"]))))
        self.classes: list[str] = trailer["classes"]
        self._checksum: int = trailer["crc32"]
        dtype = RECORDS[self.kind]
        self._width, self._count = dtype.itemsize, count
        blocks = -(-count // NAME_BLOCK)
        ends = np.cumsum(
            [HEADER.size, count * self._width, 8 * blocks, name_bytes, shards * SHARD.itemsize, shard_bytes]
        )
        records, starts, names, shard_records, shard_names, end = ends.tolist()
        if end + trailer_bytes != len(self._map):
            raise fault(self.path, f"{end + trailer_bytes} bytes", f"{len(self._map)}")
        self._records: NDArray[np.void] = np.frombuffer(self._map, dtype, count, records)
        self._starts = np.frombuffer(self._map, "<u8", blocks, starts)
        self._shards: NDArray[np.void] = np.frombuffer(self._map, SHARD, shards, shard_records)
        self._names_at, self._shard_names_at, self._content = names, shard_names, (records, end)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "SampleIndex":
        """The index in `path`, or in the folder `path`."""
        path = Path(path)
        return cls(path / INDEX_NAME if path.is_dir() else path)

    def __len__(self) -> int:
        return self._count

    def entry(self, i: int) -> Entry:
        """Sample `i`."""
        offset, size, label, shard = self.place(i)
        return Entry(os.fsdecode(self.name(i)), shard, offset, size, label)

    def place(self, i: int) -> tuple[int, int, int, int]:
        """offset, size, label and shard of sample `i`, without its name."""
        at = self._at(i)
        if self.kind == "tar":
            return _TAR_RECORD.unpack_from(self._map, at)
        return (0, *_FILE_RECORD.unpack_from(self._map, at))

    def name(self, i: int) -> bytes:
        """Name of sample `i`, as the file system's bytes."""
        end_at = self._at(i) + self._width - _END.size
        (end,) = _END.unpack_from(self._map, end_at)
        start = _END.unpack_from(self._map, end_at - self._width)[0] if i % NAME_BLOCK else 0
        base = self._names_at + int(self._starts[i // NAME_BLOCK])
        return self._map[base + start : base + end]

    def labels(self) -> NDArray[np.int32]:
        """Labels of all samples, int32 [n]: a view of the file."""
        return self._records["label"]

    def sizes(self) -> NDArray[np.uint32]:
        """Bytes of all samples, uint32 [n]: a view of the file; 0 where they were not looked up."""
        return self._records["size"]

    def shard_numbers(self) -> NDArray[np.uint32]:
        """Shards of all samples, uint32 [n]: a view of the file."""
        return self._records["shard"]

    @property
    def shard_count(self) -> int:
        """Number of shards, or of folders."""
        return len(self._shards)

    @property
    def selection(self) -> bool:
        """Whether its shards or folders may hold more than it has: it is of a list, or of what a verification left."""
        return bool((self._shards["mtime_ns"] < 0).any())

    def shard(self, k: int) -> Shard:
        """Shard `k`; IndexError beyond the last."""
        return Shard(os.fsdecode(self.shard_name(k)), int(self._shards["size"][k]), int(self._shards["mtime_ns"][k]))

    def shard_name(self, k: int) -> bytes:
        """Name of shard `k`, as the file system's bytes."""
        end = int(self._shards["name_end"][k])
        start = int(self._shards["name_end"][k - 1]) if k else 0
        return self._map[self._shard_names_at + start : self._shard_names_at + end]

    def check_content(self) -> None:
        """Read everything and compare it with the checksum (seconds a gigabyte); UserError when it is damaged."""
        crc = checksum(self._map, *self._content)
        if crc != self._checksum:
            raise fault(self.path, f"CRC-32 {self._checksum:08x}", f"{crc:08x}: the file is damaged")

    def _at(self, i: int) -> int:
        if not 0 <= i < self._count:
            raise IndexError(f"sample {i} of {self._count}")
        return HEADER.size + i * self._width

    def _trailer(self, size: int, crc: int) -> dict:
        data = self._map[max(HEADER.size, len(self._map) - size) :]
        if len(data) != size or zlib.crc32(data) != crc:
            raise fault(self.path, "the trailer that its header announces", "another: the file is cut short or damaged")
        return json.loads(data)


def checksum(data: mmap.mmap, start: int, stop: int) -> int:
    """CRC-32 of data[start:stop], in pieces."""
    crc = 0
    for at in range(start, stop, _CHUNK):
        crc = zlib.crc32(data[at : min(at + _CHUNK, stop)], crc)
    return crc


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # an empty file has no map
        raise fault(path, "an index of lut-ds", "an empty file") from error
    except OSError as error:
        raise fault(path, "a readable file", str(error.strerror or error)) from error
