"""Files that are no images: the batches before them are delivered, then they are named; nothing hangs."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lut_ds.data.loader import EvalLoader
from lut_ds.data.sources import ImageFolder
from lut_ds.data.validity import image_hw
from lut_ds.errors import RunFault
from tests.data.images import encode, photo

GOOD = encode(photo(60, 80), quality=95)


def corrupt_table(data: bytes) -> bytes:
    """A JPEG whose first Huffman table is nonsense."""
    at = data.index(b"\xff\xc4") + 5
    return data[:at] + b"\xff" * 16 + data[at + 16 :]


def wide_png() -> bytes:
    """A PNG that says it is 60,000 x 60,000."""
    data = bytearray(encode(photo(8, 8), "PNG"))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "zero.jpg": (b"", "found an empty file"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "starts with b'<!DOCTYP'"),
    "noise.png": (np.random.default_rng(0).bytes(5000), "expected one of JPEG"),
    "movie.jpg": (encode(photo(60, 80), "GIF"), "starts with b'GIF8"),
    "header.jpg": (GOOD[:20], "expected one of JPEG|cannot be decoded"),
    "half.jpg": (GOOD[: len(GOOD) // 2], "cannot be decoded: .*truncated"),
    "table.jpg": (corrupt_table(GOOD), "cannot be decoded"),
    "half.png": (encode(photo(60, 80), "PNG")[:3000], "cannot be decoded"),
    "half.webp": (encode(photo(60, 80), "WEBP")[:600], "cannot be decoded|expected one of"),
    "half.tiff": (encode(photo(60, 80), "TIFF")[:9000], "cannot be decoded|expected one of"),
    "bomb.png": (wide_png(), "expected at most 100,000,000 pixels, found 60000x60000"),
    "line.png": (encode(photo(1, 1030), "PNG"), "found 1030x1"),
}


def folder(root: Path, name: str, data: bytes) -> ImageFolder:
    for i in range(12):
        (root / f"a{i:02d}.jpg").write_bytes(encode(photo(50, 60 + i, seed=i)))
    (root / f"z{name}").write_bytes(data)
    return ImageFolder(root)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("threads", [1, 3])
def test_bad_file_is_named(tmp_path: Path, name: str, threads: int) -> None:
    data, reason = BAD[name]
    delivered: list[torch.Tensor] = []
    with pytest.raises(RunFault, match=reason) as caught:
        delivered.extend(view for view, _ in EvalLoader(folder(tmp_path, name, data), 24, 4, threads))
    assert str(tmp_path / f"z{name}") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [len(view) for view in delivered] == [4, 4, 4]


def test_file_that_vanishes(tmp_path: Path) -> None:
    source = folder(tmp_path, "gone.jpg", GOOD)
    iterator = iter(EvalLoader(source, 24, 4, 1))
    next(iterator)
    (tmp_path / "zgone.jpg").unlink()
    batches = EvalLoader(source, 24, 4, 1)
    with pytest.raises(RunFault, match=r"zgone\.jpg: cannot be read"):
        list(batches)


@pytest.mark.parametrize("cut", range(0, len(GOOD), 97))
def test_any_truncation_is_a_size_or_a_fault(cut: int) -> None:
    """The header reader never fails with anything else."""
    try:
        outcome = str(image_hw(GOOD[:cut], "name"))
    except RunFault as fault:
        outcome = str(fault)
    assert outcome == "(60, 80)" or outcome.startswith(("data: name: expected", "data: name: cannot be decoded"))
