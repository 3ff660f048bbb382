"""A source of one's own: the images of a zip file, without unpacking it.

    lut-ds pretrain lut_vits16 data.path=examples/zip_source.py:ZipImages?photos.zip

What `data.path` names after the colon is called with the text after `?` and with the split ("train", "val" or None). It
returns anything with `classes`, `len`, `read(i)`, `label(i)` and `name(i)`, where the same i is the same image on every
rank and in every run, and `read` may be called by many threads at once.
"""

import os
import struct
import zipfile
import zlib

from lut_ds.data.folder import EXTENSIONS
from lut_ds.errors import RunFault, UserError

_LOCAL_HEADER = struct.Struct("<26xHH")  # the lengths of the name and the extra field that follow it


class ZipImages:
    """Images in a zip file, stored or deflated; their classes are its topmost folders.

    With a folder `train/` (or `val/`) in the zip, the split is what lies in it. UserError when there is no such image.
    """

    def __init__(self, path: str, split: str | None) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)  # kept open: reads are positional, so threads can share it
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.infolist(), key=lambda member: member.filename)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"data.path: {path}: expected a zip file, found: {error}; check the path") from error
        members = [member for member in members if member.filename.lower().encode().endswith(EXTENSIONS)]
        inside = f"{split}/" if split and any(m.filename.startswith(f"{split}/") for m in members) else ""
        if split == "val" and not inside:
            raise UserError(f"data.path: {path}: expected a folder val/ in the zip file, found none; add it")
        self._members = [member for member in members if member.filename.startswith(inside)]
        if not self._members:
            raise UserError(f"data.path: {path}: expected images in the zip file, found none; check the path")
        folders = [
            member.filename.removeprefix(inside).rpartition("/")[0].partition("/")[0] for member in self._members
        ]
        self.classes = sorted(set(folders) - {""})
        self._labels = [self.classes.index(folder) if folder else -1 for folder in folders]

    def __len__(self) -> int:
        return len(self._members)

    def read(self, i: int) -> bytes:
        """The encoded image `i`; RunFault when the zip file is damaged there."""
        member = self._members[i]
        try:
            lengths = _LOCAL_HEADER.unpack(os.pread(self._fd, _LOCAL_HEADER.size, member.header_offset))
            start = member.header_offset + _LOCAL_HEADER.size + sum(lengths)
            data = os.pread(self._fd, member.compress_size, start)
            if member.compress_type == zipfile.ZIP_DEFLATED:
                data = zlib.decompress(data, -zlib.MAX_WBITS)
        except (OSError, struct.error, zlib.error) as error:
            raise RunFault(f"data: {self.name(i)}: cannot be read: {error}") from error
        if zlib.crc32(data) != member.CRC:
            raise RunFault(f"data: {self.name(i)}: expected CRC-32 {member.CRC:08x}, found {zlib.crc32(data):08x}")
        return data

    def label(self, i: int) -> int:
        """The class of image `i`, -1 when it lies in no folder."""
        return self._labels[i]

    def name(self, i: int) -> str:
        """What to call image `i` in a message."""
        return f"{self._path}:{self._members[i].filename}"
