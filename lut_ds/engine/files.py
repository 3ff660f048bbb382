"""Bytes that reach the disk as they were meant: written, hashed on the way, synced, read back and compared.

safetensors' own writer makes a second copy of every tensor while it holds the interpreter, which would stall the steps
beside a background save; the format is a JSON header and raw bytes, so it is written here in pieces instead.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE = 16 << 20  # bytes at a time: large enough for a shared file system, small enough to stop in between
# What a network file system says when a server was away for a moment.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Cancelled(OSError):
    """The write was given up because the process leaves."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Write a safetensors file and check that it can be read back.

    Args:
        tensors: contiguous, on the CPU; they must not change meanwhile.
        metadata: strings stored in the header.
        cancelled: asked between pieces; True gives up.

    Returns:
        `size` and `sha256` of the bytes that were meant.

    Raises:
        OSError: not written, or what is read back differs; a transient error of a network file system is retried once.
        Cancelled: given up.
    """

    def pieces() -> Iterator[memoryview | bytes]:
        yield _header(tensors, metadata)
        for name in _order(tensors):
            data = tensors[name].reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), PIECE):
                if cancelled():
                    raise Cancelled(errno.ECANCELED, "given up", str(path))
                yield data[start : start + PIECE]

    return _twice(lambda: _write(path, pieces()))


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write JSON as `write_tensors` does tensors."""
    return _twice(lambda: _write(path, iter([json.dumps(value, indent=1).encode()])))


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step, so that a reader never sees half of it; one process writes at a time."""
    aside = path.with_name(f".{path.name}.partial")  # what a killed process left is taken over by the next
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file as it is on the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, pieces: Iterator[memoryview | bytes]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
        # What is read back below then comes from the disk, where the file system allows it, not from memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    meant = {"size": size, "sha256": digest.hexdigest()}
    if describe_file(path) != meant:
        raise OSError(errno.EIO, "what was written reads back differently", str(path))
    return meant


def _twice(write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Try again after a second what a network file system may only have refused for a moment."""
    try:
        return write()
    except OSError as error:
        if error.errno not in TRANSIENT:
            raise
        time.sleep(1.0)
        return write()


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Widest elements first, so that every tensor starts at a multiple of its element size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The length of the JSON header (8 bytes, little endian) and the header, padded with spaces to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in _order(tensors):
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
