"""Walking the headers of a tar file with positional reads: where each regular file lies, without reading the files."""

import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lut_ds.errors import UserError

BLOCK = 512
_WINDOW = 4096  # bytes a read: a header and, mostly, the small member (a label) behind it
_SMALL = 1 << 20  # the longest name or pax header that is believed
_NO_DATA = b"123456"  # links, devices, folders, pipes: their size field says nothing about blocks that follow
_EXTENDS = b"LKxXg"  # GNU's long name and long link, pax (also Solaris'), pax for all that follow
_PAX = re.compile(rb"(\d{1,20}) ([^=]+)=")


class Member(NamedTuple):
    """A regular file in a tar."""

    name: bytes
    offset: int  # of its first byte
    size: int


class TarWalk:
    """Iterates over the regular files of an uncompressed tar: ustar, GNU (long names) and pax, as tarfile reads them.

    Raises:
        UserError: the file is compressed, no tar, cut short (also one without the two zero blocks at its end) or holds a
            sparse file; the message names the shard and the offset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"shard {path}: expected a readable tar, found: {error.strerror or error}") from error
        info = os.fstat(self._fd)
        self.size, self.mtime_ns = info.st_size, info.st_mtime_ns
        self._windows: deque[tuple[int, bytes]] = deque(maxlen=2)  # two: a label may lie before its image
        self._globals: dict[bytes, bytes] = {}

    def __enter__(self) -> "TarWalk":
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`."""
        for start, window in self._windows:
            if start <= offset and offset + size <= start + len(window):
                return window[offset - start : offset - start + size]
        window = self._pread(max(size, _WINDOW), offset)
        self._windows.append((offset, window))
        data = window[:size]
        if len(data) < size:
            raise self._fault(offset, f"{size} bytes", f"the end of the file after {len(data)}: it is cut short")
        return data

    def __iter__(self) -> Iterator[Member]:
        at, extended = 0, dict(self._globals)
        while True:
            header = self._header(at)
            if header is None:
                return
            kind, size, data = header[156:157], _number(header[124:136]), at + BLOCK
            if size < 0:
                raise self._fault(at, "a size", f"{header[124:136]!r}")
            if kind in _EXTENDS:
                self._extend(kind, self._small(data, size), extended, at)
            else:
                size = self._pax_size(extended, size, at)
                if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in extended):
                    raise self._fault(
                        at, "files that are stored whole", "a sparse file; pack it again without --sparse"
                    )
                name = extended.get(b"path") or _name(header)
                if kind in (b"0", b"\0", b"7") and not (kind == b"\0" and name.endswith(b"/")):
                    if data + size > self.size:
                        raise self._fault(
                            at, f"{size} bytes of {_text(name)}", f"the end after {self.size - data}: it is cut short"
                        )
                    yield Member(name, data, size)
                extended = dict(self._globals)
            at = data if kind in _NO_DATA else data + -(-size // BLOCK) * BLOCK

    def _header(self, at: int) -> bytes | None:
        """The header at `at`, None for the zero block that ends the archive."""
        if at >= self.size:
            found = "an empty file" if not self.size else f"the end of the file at byte {self.size}: it is cut short"
            raise self._fault(at, "a header or the zero blocks that end a tar", found)
        header = self.read(at, BLOCK)
        if not any(header):
            return None
        if not header_is_valid(header):
            compressed = (
                header[:2] == b"\x1f\x8b" or header[:4] in (b"\x28\xb5\x2f\xfd", b"\xfd7zX") or header[:3] == b"BZh"
            )
            raise self._fault(
                at, "an uncompressed tar", f"{'a compressed file' if compressed and not at else 'no tar header'}"
            )
        return header

    def _small(self, offset: int, size: int) -> bytes:
        if size > _SMALL:
            raise self._fault(offset, f"a name of at most {_SMALL} bytes", f"{size}")
        return self.read(offset, size)

    def _extend(self, kind: bytes, data: bytes, extended: dict[bytes, bytes], at: int) -> None:
        """Apply a GNU long name or a pax header to what comes next (or, for `g`, to all that come)."""
        if kind in b"LK":
            if kind == b"L":
                extended[b"path"] = data.split(b"\0", 1)[0]
            return
        records = dict(self._pax(data, at))
        extended.update(records)
        if kind == b"g":
            self._globals.update(records)

    def _pax(self, data: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
        """Keyword and value of every record "length keyword=value\\n" of a pax header."""
        start = 0
        while start < len(data) and data[start]:
            match = _PAX.match(data, start)
            length = int(match[1]) if match else 0
            if not match or length <= match.end() - start or data[start + length - 1 : start + length] != b"\n":
                raise self._fault(at, "a pax header", "a damaged one")
            yield match[2], data[match.end() : start + length - 1]
            start += length

    def _pax_size(self, extended: dict[bytes, bytes], size: int, at: int) -> int:
        text = extended.get(b"size")
        if text is not None and not text.isdigit():
            raise self._fault(at, "a pax header", "a damaged one")
        return size if text is None else int(text)

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            return read_at(self._fd, size, offset)
        except OSError as error:
            raise UserError(f"shard {self.path}: byte {offset}: cannot be read: {error.strerror or error}") from error

    def _fault(self, offset: int, expected: str, found: str) -> UserError:
        return UserError(
            f"shard {self.path}: byte {offset}: expected {expected}, found {found}; copy or write it again"
        )


def read_at(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes from `offset`, fewer only at the end of the file."""
    data = os.pread(fd, size, offset)
    if len(data) == size or not data:
        return data
    parts, done = [data], len(data)
    while done < size and (data := os.pread(fd, size - done, offset + done)):
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def header_is_valid(header: bytes) -> bool:
    """Whether a block of 512 bytes has the checksum of a tar header (of unsigned or, from old tools, of signed bytes)."""
    expected = _number(header[148:156])
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    return expected == total or expected == total - 256 * sum(byte >> 7 for byte in header[:148] + header[156:])


def header_size(header: bytes) -> int:
    """The size field of a tar header, -1 when there is none."""
    return _number(header[124:136])


def _number(field: bytes) -> int:
    """An octal number, or GNU's base 256 for large ones; -1 for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    try:
        return int(text or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and prefix:  # GNU's own format uses these bytes for other things
        return prefix + b"/" + name
    return name


def _text(name: bytes) -> str:
    return os.fsdecode(name)
