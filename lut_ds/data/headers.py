"""What an encoded image says about itself before it is decoded: format, mode, size, and what people should know of it."""

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lut_ds.data.records import Note
from lut_ds.data.validity import FORMATS

_EXTENSIONS = {
    "JPEG": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
}
_OWNER = {extension: format for format, extensions in _EXTENSIONS.items() for extension in extensions}
_ORIENTATION = 0x0112  # EXIF tag
_BITS_PER_SAMPLE = 258  # TIFF tag
_SAMPLINGS = {(1, 1): "4:4:4", (2, 1): "4:2:2", (2, 2): "4:2:0", (1, 2): "4:4:0", (4, 1): "4:1:1", (4, 2): "4:1:0"}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_MAGIC = (
    (b"GIF8", "GIF"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"<svg", "SVG"),
    (b"<!doctype html", "HTML"),
    (b"<html", "HTML"),
    (b"<?xml", "XML"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
)


@dataclass(frozen=True)
class Header:
    """The header of an encoded image; `sampling` is a JPEG's chroma subsampling such as 4:2:0."""

    format: str
    mode: str
    width: int
    height: int
    sampling: str | None
    notes: Note


def read_header(data: bytes, name: str) -> Header | None:
    """The header of an encoded image that is called `name`, None when it is not one that the pipeline knows.

    Nothing is decoded, so that any size is safe; Pillow's limit is lifted meanwhile. Not for several threads at once.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            format = "JPEG" if image.format == "MPO" else str(image.format)  # a JPEG with more pictures behind it
            notes = _notes(image, format, data, name)
            return Header(format, image.mode, image.width, image.height, _sampling(image), notes)
    except Exception:  # noqa: BLE001 - Pillow's plug-ins raise whatever broken metadata makes them trip over
        return None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def content_name(data: bytes) -> str | None:
    """What bytes that are no image of a known format seem to be, None if that is not known either."""
    head = data[:512].lstrip().lower()
    if data[4:8] == b"ftyp":
        return {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}.get(data[8:12])
    return next((what for magic, what in _MAGIC if data.startswith(magic) or head.startswith(magic)), None)


def _sampling(image: Image.Image) -> str | None:
    layers = getattr(image, "layer", None)
    if not layers:
        return None
    if len(layers) < 3:
        return "gray" if len(layers) == 1 else None
    (_, across, down, _), (_, chroma_across, chroma_down, _) = layers[:2]
    ratio = (across // max(1, chroma_across), down // max(1, chroma_down))
    return _SAMPLINGS.get(ratio, f"{ratio[0]}x{ratio[1]}")


def _notes(image: Image.Image, format: str, data: bytes, name: str) -> Note:
    found = {
        Note.WRONG_EXTENSION: _OWNER.get(name.rpartition(".")[2].lower(), format) != format,
        Note.ROTATED: _orientation(image) not in (0, 1),
        Note.CMYK: image.mode == "CMYK",
        Note.DEEP: _bits(image, data) > 8,
        Note.ANIMATED: format in ("PNG", "WEBP") and bool(getattr(image, "is_animated", False)),
        Note.TRANSPARENT: "A" in image.mode or "transparency" in image.info,
        Note.TRAILING: not data.rstrip(b"\0").endswith(_ENDS.get(format, b"")),
    }
    notes = Note(0)
    for note, holds in found.items():
        notes |= note if holds else Note(0)
    return notes


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(_ORIENTATION, 1)) if "exif" in image.info or image.format == "TIFF" else 1


def _bits(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        return max(tags.get(_BITS_PER_SAMPLE, (8,)))
    return 8
