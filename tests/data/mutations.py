"""Damaged image files in any number: every format the loader reads, and what disks, networks and crawlers do to them."""

import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from tests.data.images import encode, photo

Mutation = Callable[[bytes, np.random.Generator], bytes]


def seeds() -> dict[str, bytes]:
    """Small valid images of every kind, by extension and kind."""
    picture = photo(30, 38, seed=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    deep = Image.fromarray(np.asarray(picture)[..., 0].astype(np.uint16) * 257)
    return {
        "jpg": encode(picture, quality=92),
        "progressive.jpg": encode(picture, quality=80, progressive=True),
        "cmyk.jpg": encode(picture.convert("CMYK"), quality=90),
        "gray.jpg": encode(picture.convert("L")),
        "exif.jpg": encode(picture, exif=exif),
        "restart.jpg": encode(picture, quality=75, subsampling=0, restart_marker_blocks=2),
        "png": encode(picture, "PNG"),
        "deep.png": encode(deep, "PNG"),
        "palette.png": encode(picture.quantize(16), "PNG"),
        "alpha.png": encode(picture.convert("RGBA"), "PNG"),
        "webp": encode(picture, "WEBP", quality=80),
        "lossless.webp": encode(picture, "WEBP", lossless=True),
        "bmp": encode(picture, "BMP"),
        "tiff": encode(picture, "TIFF"),
        "lzw.tiff": encode(picture, "TIFF", compression="tiff_lzw"),
    }


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    """An upload that stopped."""
    return data[: rng.integers(0, len(data))]


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    """A disk that forgets: 1 to 32 bits."""
    array = np.frombuffer(data, np.uint8).copy()
    at = rng.integers(0, len(array), rng.integers(1, 33))
    array[at] ^= (1 << rng.integers(0, 8, len(at))).astype(np.uint8)
    return array.tobytes()


def zero_block(data: bytes, rng: np.random.Generator) -> bytes:
    """A hole in a file that was copied sparsely."""
    start = rng.integers(0, len(data))
    size = min(int(rng.integers(1, 600)), len(data) - start)
    return data[:start] + bytes(size) + data[start + size :]


def random_block(data: bytes, rng: np.random.Generator) -> bytes:
    """A sector of another file."""
    start = rng.integers(0, len(data))
    size = min(int(rng.integers(1, 200)), len(data) - start)
    return data[:start] + rng.bytes(size) + data[start + size :]


def insert(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes that a protocol put in between."""
    at = rng.integers(0, len(data))
    return data[:at] + rng.bytes(int(rng.integers(1, 40))) + data[at:]


def delete(data: bytes, rng: np.random.Generator) -> bytes:
    """A lost packet."""
    at = rng.integers(0, len(data))
    return data[:at] + data[at + int(rng.integers(1, 100)) :]


def header_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Nonsense among the first hundred bytes, where sizes, tables and offsets are."""
    array = np.frombuffer(data, np.uint8).copy()
    at = rng.integers(0, min(100, len(array)), rng.integers(1, 5))
    array[at] = rng.choice([0, 1, 127, 128, 255], len(at))
    return array.tobytes()


def append(data: bytes, rng: np.random.Generator) -> bytes:
    """Something after the end."""
    return data + rng.bytes(int(rng.integers(1, 500)))


MUTATIONS: list[Mutation] = [
    truncate,
    flip_bits,
    zero_block,
    random_block,
    insert,
    delete,
    header_bytes,
    append,
]


def resized_header(data: bytes, height: int, width: int) -> bytes:
    """A PNG or JPEG whose header claims another size, its checksum right."""
    if data[:4] == b"\x89PNG":
        header = data[12:16] + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    at = next(i for i in range(2, len(data)) if data[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def bombs() -> dict[str, bytes]:
    """Small files that claim, or hold, gigabytes."""
    good = seeds()
    flat = Image.new("L", (12_000, 12_000))
    return {
        "claims.png": resized_header(good["png"], 60_000, 60_000),
        "claims.jpg": resized_header(good["jpg"], 65_000, 65_000),
        "wide.jpg": resized_header(good["jpg"], 20, 65_000),
        "largest.png": resized_header(good["png"], 2**31 - 1, 2**31 - 1),
        "none.jpg": resized_header(good["jpg"], 0, 38),
        "holds.png": encode(flat, "PNG"),
    }


def strangers() -> dict[str, bytes]:
    """Files that are no images of ours, whatever their names say."""
    return {
        "zero.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "movie.jpg": encode(photo(30, 38), "GIF"),
        "text.png": b"not an image\n" * 20,
        "zeros.jpg": bytes(2000),
        "archive.jpg": b"PK\x03\x04" + bytes(100),
        "marker.jpg": b"\xff\xd8\xff\xd9",
        "noise.webp": np.random.default_rng(0).bytes(800),
    }


def mutants(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`count` damaged files (name, bytes): each seed under each mutation in turn, some damaged twice."""
    rng = np.random.default_rng(seed)
    kinds = list(seeds().items())
    for i in range(count):
        kind, data = kinds[i % len(kinds)]
        for _ in range(1 if rng.random() < 0.8 else 2):
            mutation = MUTATIONS[(i // len(kinds) + int(rng.integers(2))) % len(MUTATIONS)]
            data = mutation(data, rng) if data else data
        yield f"{i:05d}.{kind}", data
