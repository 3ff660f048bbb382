"""Writing an index: any number of samples in bounded memory, in place only once it is complete."""

import errno
import json
import mmap
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lut_ds.data.index import HEADER, MAGIC, NAME_BLOCK, RECORDS, SHARD, VERSION, Kind, checksum
from lut_ds.errors import UserError

_LONGEST_NAME = 1 << 15  # bytes; keeps the end of a name within its block below 2**32
_COPY = 1 << 24


class IndexWriter:
    """Appends samples to an index that appears at `path` when `finish` returns; left without it, nothing is left behind.

    Samples keep the order of their appending. `root` is what shard names are relative to, itself relative to the index's
    folder or absolute. Memory is bounded by the number of shards and one start of a name for each 65,536 samples.

    Raises:
        UserError: the folder of `path` cannot be written, a name is longer than 32,767 bytes or an image than 4 GiB.
    """

    def __init__(self, path: str | os.PathLike[str], kind: Kind, root: str | os.PathLike[str] = os.curdir) -> None:
        self.path, self.kind, self._root = Path(path), kind, os.fspath(root)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._names: IO[bytes] = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 - until close()
            self._aside, self._file = self._temporary()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"index {self.path}: cannot be written: {error.strerror or error}; give a folder that can be written"
            ) from error
        self._file.write(bytes(HEADER.size))
        self._count = self._name_bytes = self._shard_bytes = 0
        self._last_shard = 0
        self._starts: list[int] = []
        self._shard_names: list[bytes] = []
        self._shards: list[tuple[int, int, int]] = []
        self._pending: list[tuple[bytes, int, int, int, int]] = []

    def add_shard(self, name: str | bytes, size: int = -1, mtime_ns: int = -1) -> int:
        """The number of a new shard, named relative to the root, with its bytes (a folder: files) and time of change."""
        self._shard_names.append(os.fsencode(name))
        self._shard_bytes += len(self._shard_names[-1])
        self._shards.append((self._shard_bytes, size, mtime_ns))
        return len(self._shards) - 1

    def append(self, name: str | bytes, shard: int, size: int = 0, label: int = -1, offset: int = 0) -> None:
        """Add one sample of shard `shard`."""
        self._pending.append((os.fsencode(name), shard, size, label, offset))
        if len(self._pending) >= NAME_BLOCK:
            self._flush()

    def extend(
        self,
        names: bytes,
        lengths: ArrayLike,
        shards: ArrayLike,
        sizes: ArrayLike,
        labels: ArrayLike,
        offsets: ArrayLike,
    ) -> None:
        """Add m samples: their names end to end with int `lengths` [m], and four columns of [m] (or one number for all)."""
        self._flush()
        self._write(names, np.asarray(lengths, np.int64), shards, sizes, labels, offsets)

    @property
    def shard_count(self) -> int:
        """Shards so far."""
        return len(self._shards)

    def __len__(self) -> int:
        return self._count + len(self._pending)

    def finish(self, classes: Sequence[str] = (), relabel: NDArray[np.int32] | None = None) -> None:
        """Complete the file and put it in place. `relabel` [old labels] turns the labels appended into those of `classes`."""
        self._flush()
        starts = np.array(self._starts, "<u8").tobytes()
        self._file.write(starts)
        self._names.seek(0)
        while data := self._names.read(_COPY):
            self._file.write(data)
        self._file.write(np.array(self._shards, SHARD).tobytes() + b"".join(self._shard_names))
        self._file.flush()
        end = self._file.tell()
        with mmap.mmap(self._file.fileno(), end) as content:
            if relabel is not None and self._count:
                self._relabel(content, relabel)
            crc = checksum(content, HEADER.size, end)
        root = os.fsencode(self._root).hex()  # a path may hold bytes that JSON cannot
        trailer = json.dumps({"kind": self.kind, "root": root, "classes": list(classes), "crc32": crc}).encode()
        self._file.write(trailer)
        self._file.seek(0)
        counts = (self._count, self._name_bytes, len(self._shards), self._shard_bytes, len(trailer))
        self._file.write(HEADER.pack(MAGIC, VERSION, zlib.crc32(trailer), *counts))
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._aside, self.path)
        self.close()

    def close(self) -> None:
        """Give up what is not finished; may be called again."""
        self._file.close()
        self._names.close()
        self._aside.unlink(missing_ok=True)

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _temporary(self) -> tuple[Path, IO[bytes]]:
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(handle, 0o666 & ~umask)  # mkstemp makes it private
        return Path(name), os.fdopen(handle, "w+b")

    def _flush(self) -> None:
        if not self._pending:
            return
        names, shards, sizes, labels, offsets = zip(*self._pending)
        self._pending = []
        self._write(b"".join(names), np.fromiter(map(len, names), np.int64), shards, sizes, labels, offsets)

    def _write(
        self,
        names: bytes,
        lengths: NDArray[np.int64],
        shards: ArrayLike,
        sizes: ArrayLike,
        labels: ArrayLike,
        offsets: ArrayLike,
    ) -> None:
        sizes = np.asarray(sizes, np.int64)
        self._check(lengths, sizes)
        ends = self._name_bytes + np.cumsum(lengths)
        rows = np.arange(self._count, self._count + len(lengths))
        firsts = rows % NAME_BLOCK == 0
        self._starts.extend((ends - lengths)[firsts].tolist())
        block = rows // NAME_BLOCK
        recent = block[0] if len(block) else 0
        starts = np.array(self._starts[recent:], np.int64)
        records = np.zeros(len(lengths), RECORDS[self.kind])
        if self.kind == "tar":
            records["offset"] = offsets
            self._check_order(np.broadcast_to(np.asarray(shards, np.int64), len(lengths)))
        records["size"], records["label"], records["shard"] = sizes, labels, shards
        records["name_end"] = ends - starts[block - recent]
        self._file.write(records.tobytes())
        self._names.write(names)
        self._count += len(lengths)
        self._name_bytes += len(names)

    def _check(self, lengths: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        if lengths.size and lengths.max() >= _LONGEST_NAME:
            raise UserError(
                f"index {self.path}: expected names below {_LONGEST_NAME} bytes, found {lengths.max()}; rename"
            )
        if sizes.size and sizes.max() >= 1 << 32:
            raise UserError(f"index {self.path}: expected images below 4 GiB, found {sizes.max()} bytes; leave it out")

    def _check_order(self, shards: NDArray[np.int64]) -> None:
        if shards.size and (shards[0] < self._last_shard or (np.diff(shards) < 0).any()):
            raise ValueError("IndexWriter: the samples of tar shards must come shard by shard, in their order")
        self._last_shard = int(shards[-1]) if shards.size else self._last_shard

    def _relabel(self, content: mmap.mmap, relabel: NDArray[np.int32]) -> None:
        records: NDArray[np.void] = np.frombuffer(content, RECORDS[self.kind], self._count, HEADER.size)
        for start in range(0, self._count, _COPY):
            labels = records["label"][start : start + _COPY]
            labels[labels >= 0] = relabel[labels[labels >= 0]]
        del records, labels  # the map cannot be closed under a view of it
