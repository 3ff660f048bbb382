"""An image folder with every kind of fault planted in it, and what a verification must say of each file."""

import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.images import encode, photo

PICTURE = photo(48, 60, seed=99)
GOOD = encode(PICTURE, quality=90)
PNG = encode(PICTURE, "PNG")


def huge_jpeg() -> bytes:
    """A JPEG of a few kilobytes whose header says 65,500 x 65,500."""
    at = GOOD.index(b"\xff\xc0") + 5
    return GOOD[:at] + b"\xff\xdc\xff\xdc" + GOOD[at + 4 :]


def huge_png() -> bytes:
    """A PNG that says it is 60,000 x 60,000."""
    data = bytearray(PNG)
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def flipped() -> bytes:
    """A JPEG with a wrong bit among its coefficients, which decodes to slightly other pixels."""
    at = GOOD.index(b"\xff\xda") + 400
    return GOOD[:at] + bytes([GOOD[at] ^ 1]) + GOOD[at + 1 :]


def rotated() -> bytes:
    """A JPEG whose EXIF asks for a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(photo(48, 60, seed=3), exif=exif)


def deep_png() -> bytes:
    """16 bits of gray."""
    return encode(Image.fromarray((np.arange(48 * 60).reshape(48, 60) * 13 % 65536).astype(np.uint16)), "PNG")


BAD = {
    "bomb.jpg": (huge_jpeg(), "too large"),
    "bomb.png": (huge_png(), "too large"),
    "empty.jpg": (b"", "empty"),
    "half.jpg": (GOOD[: len(GOOD) // 2], "undecodable"),
    "half.png": (PNG[: len(PNG) // 2], "undecodable"),
    "header.jpg": (GOOD[:20], "not an image"),
    "line.png": (encode(photo(1, 1030), "PNG"), "too narrow"),
    "movie.jpg": (encode(PICTURE, "GIF"), "unsupported format"),
    "no_end.png": (PNG[:-12], "undecodable"),  # Pillow takes it, the training pipeline does not
    "noise.png": (np.random.default_rng(0).bytes(3000), "not an image"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
}
ODD = {
    "animated.webp": (encode(PICTURE, "WEBP", save_all=True, append_images=[photo(48, 60)]), "animated"),
    "clear.png": (encode(PICTURE.convert("RGBA"), "PNG"), "transparent"),
    "deep.png": (deep_png(), "deep"),
    "named.jpg": (PNG, "wrong extension"),
    "print.jpg": (encode(PICTURE.convert("CMYK")), "cmyk"),
    "rotated.jpg": (rotated(), "rotated"),
    "tail.jpg": (GOOD + b"more", "trailing"),
}
FINE = {
    "flipped.jpg": flipped(),
    "gray.jpg": encode(PICTURE.convert("L")),
    "palette.png": encode(PICTURE.convert("P"), "PNG"),
    "panorama.jpg": encode(PICTURE, "MPO", save_all=True, append_images=[photo(48, 60)]),
    "plain.JPEG": GOOD,
    "progressive.jpg": encode(PICTURE, progressive=True, quality=80),
    "scan.tif": encode(PICTURE, "TIFF"),
    "small.bmp": encode(photo(3, 5), "BMP"),
    "web.webp": encode(PICTURE, "WEBP"),
}


def plant(root: Path) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Write train and val below `root`.

    Returns:
        the reason of every file that must go to quarantine, and (name, kind) of every finding, names relative to `root`.
    """
    files = FINE | {name: data for name, (data, _) in (BAD | ODD).items()}
    for name, data in files.items():
        _write(root / "train" / "a" / name, data)
    reasons = {f"train/a/{name}": reason for name, (_, reason) in BAD.items()}
    (root / "train" / "a" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    reasons["train/a/gone.jpg"] = "missing"
    if os.geteuid():  # root may read anything
        _write(root / "train" / "a" / "secret.jpg", GOOD)
        (root / "train" / "a" / "secret.jpg").chmod(0)
        reasons["train/a/secret.jpg"] = "unreadable"
    findings = {(f"train/a/{name}", kind) for name, (_, kind) in ODD.items()}
    return reasons, findings | _plant_oddities(root)


def _plant_oddities(root: Path) -> set[tuple[str, str]]:
    """Duplicates, and folders that are not as they should be."""
    _write(root / "train" / "b" / "copy.jpg", GOOD)
    _write(root / "train" / "b" / "notes.txt", b"")
    _write(root / "train" / "b" / "clip.gif", encode(PICTURE, "GIF"))
    _write(root / "val" / "a" / "leak.jpg", GOOD)
    _write(root / "val" / "c" / "own.jpg", encode(photo(40, 40, seed=7)))
    (root / "train" / "nothing").mkdir()
    return {
        ("train/b/copy.jpg", "duplicate"),
        ("train/b/notes.txt", "ignored file"),
        ("train/b/clip.gif", "ignored file"),
        ("train/nothing", "empty class"),
        ("train/nothing", "class in one split"),
        ("train/b", "class in one split"),
        ("val/c", "class in one split"),
        ("val/a/leak.jpg", "duplicate across splits"),
    }


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
