"""The making of one tar shard: bytes that depend on the samples and the options alone."""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lut_ds.data.decoding import Decoder
from lut_ds.data.pack import skipped_path
from lut_ds.data.patience import PatientReader
from lut_ds.data.sources import Source
from lut_ds.data.tar import BLOCK
from lut_ds.data.validity import image_hw
from lut_ds.data.views import resized_hw
from lut_ds.data.wds import IMAGES
from lut_ds.errors import RunFault

_QUALITY = 95
_RETRY_SECONDS = 60.0  # that nothing of the source can be read; then the pack stops, to go on when it runs again
_STEM = 48  # bytes of the original name that a key keeps: with the position it fits the oldest tar header


class Encoder:
    """Turns the bytes of an image into those to store.

    Decoded as training does: EXIF orientation is not applied, and the image that is written has no EXIF, so that every reader
    sees the pixels that training would have made of the original. JPEGs are written baseline, 4:2:0.

    Args:
        shorter_side: pixels; larger images are made smaller by Lanczos resampling, others stay as they are.
        quality: of the JPEGs, 95 when None. Without `shorter_side` every image is encoded again.
    """

    def __init__(self, shorter_side: int | None, quality: int | None) -> None:
        self._shorter, self._quality = shorter_side, quality
        self._decode = Decoder()

    def __call__(self, data: bytes, name: str) -> tuple[bytes, str]:
        """Bytes and extension to store; RunFault naming an image that cannot be decoded, where it has to be."""
        if self._shorter is None and self._quality is None:
            return data, _extension(name)
        size = image_hw(data, name)
        if self._shorter is not None and min(size) <= self._shorter:
            return data, _extension(name)
        try:
            image = Image.fromarray(self._decode(data))
        except RuntimeError as error:
            raise RunFault(f"data: {name}: cannot be decoded") from error
        if self._shorter is not None:
            height, width = resized_hw(np.array([size], np.int32), self._shorter)[0].tolist()
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=self._quality or _QUALITY, subsampling="4:2:0")
        return stored.getvalue(), "jpg"


def write_shard(
    path: Path, source: Source, samples: NDArray[np.int64], positions: NDArray[np.int64], encoder: Encoder
) -> None:
    """Write int64 `samples` [m], which have int64 `positions` [m] in the order, as a shard that appears at `path` whole.

    Each is `KEY.jpg` (or its own extension) and, with a label, `KEY.cls`; KEY is the position and the original name. What
    cannot be read or decoded is listed beside the shard instead.
    """
    skipped: list[dict[str, str]] = []
    reader = PatientReader(source, _RETRY_SECONDS)
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample, position in zip(samples.tolist(), positions.tolist()):
                for name, data in _members(source, reader, sample, position, encoder, skipped):
                    info = tarfile.TarInfo(name)  # time and owner are zero
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        file.flush()
        os.fsync(file.fileno())
    if skipped:
        skipped_path(path).write_text("".join(json.dumps(item) + "\n" for item in skipped))
    os.replace(aside, path)


def packed_bytes(source: Source, encoder: Encoder, samples: NDArray[np.int64]) -> int:
    """The bytes that int64 `samples` [m] take in a shard."""
    reader = PatientReader(source, _RETRY_SECONDS)
    members = [data for sample in samples.tolist() for _, data in _members(source, reader, sample, 0, encoder, [])]
    return sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members)


def _members(
    source: Source,
    reader: PatientReader,
    sample: int,
    position: int,
    encoder: Encoder,
    skipped: list[dict[str, str]],
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a sample's members; none, and a line in `skipped`, when it cannot be used."""
    name = source.name(sample)
    found = reader.read(sample)  # outside of the try: storage that is away must not become shards of nothing
    try:
        if isinstance(found, RunFault):
            raise found
        data, extension = encoder(found, name)
    except RunFault as fault:
        skipped.append({"name": name, "reason": str(fault)})
        return
    stem = os.path.basename(name.rpartition(":")[2]).rpartition(".")[0]
    key = f"{position:09d}_{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:_STEM]}"
    yield f"{key}.{extension}", data
    if (label := source.label(sample)) >= 0:
        yield f"{key}.cls", str(label).encode()


def _extension(name: str) -> str:
    extension = name.rpartition(".")[2].lower()
    return extension if extension.encode() in IMAGES else "jpg"
