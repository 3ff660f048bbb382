"""The examination of samples: each is read, hashed, and decoded as training would decode it."""

import hashlib
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.decoding import Decoder
from lut_ds.data.headers import Header, content_name, read_header
from lut_ds.data.patience import PatientReader
from lut_ds.data.records import RECORD, Details, State
from lut_ds.data.sources import Source
from lut_ds.data.validity import FORMATS, LONGEST, MOST_PIXELS, image_hw, undecodable
from lut_ds.errors import RunFault


class _Unusable(Exception):
    def __init__(self, state: State, detail: str) -> None:
        super().__init__(detail)
        self.state = state


class Inspector:
    """Examines chunks of samples of one source; made inside a worker process.

    Args:
        source: what is examined.
        min_side: pixels; an image whose shorter side is below it is too small.
        retry_seconds: how long storage that is away is waited for, once anything was read: what it holds is not bad.
        say: takes a line about that, for people.
    """

    def __init__(self, source: Source, min_side: int, retry_seconds: float, say: Callable[[str], None]) -> None:
        self._source, self._min_side, self._decode = source, min_side, Decoder()
        self._reader = PatientReader(source, retry_seconds, suspect=False, say=say)

    def __call__(self, samples: NDArray[np.int64]) -> Details:
        """Examine int64 `samples` [m]; RunFault when the storage stays away."""
        records, said = np.zeros(len(samples), RECORD), {}
        for record, sample in zip(records, samples.tolist()):
            try:
                self._examine(sample, record)
                record["state"] = State.USABLE
            except _Unusable as reason:
                record["state"] = reason.state
                said[sample] = str(reason)
        return Details(records, said)

    def _examine(self, sample: int, record: np.void) -> None:
        name = self._source.name(sample)
        data = self._read(sample, name)
        record["bytes"] = len(data)
        record["digest"] = np.frombuffer(hashlib.sha256(data).digest(), "<u8", 2)
        if not data:
            raise _Unusable(State.EMPTY, "no bytes")
        header = read_header(data, name)
        if header is not None:
            record["format"], record["notes"] = header.format, header.notes
            record["width"], record["height"] = header.width, header.height
        self._check(data, name, header)

    def _read(self, sample: int, name: str) -> bytes:
        found = self._reader.read(sample)
        if not isinstance(found, RunFault):
            return found
        if not isinstance(found.__cause__, FileNotFoundError):
            raise _Unusable(State.UNREADABLE, str(found.__cause__ or found)) from found
        link = os.path.islink(name)
        what = f"a link to {os.readlink(name)}, which does not exist" if link else "no such file"
        raise _Unusable(State.MISSING, what) from found

    def _check(self, data: bytes, name: str, header: Header | None) -> None:
        """Raise _Unusable for what training would not use, decoding included."""
        try:
            size = image_hw(data, name)
        except RunFault as fault:
            raise _Unusable(*_refused(data, name, header, fault)) from fault
        if min(size) < self._min_side:
            raise _Unusable(State.TOO_SMALL, f"{size[1]}x{size[0]} pixels, a side is below {self._min_side}")
        if not self._decodes(data, size):
            why = next(undecodable([data], [size], None))  # once more, for the words
            raise _Unusable(State.UNDECODABLE, why or "does not decode every time")

    def _decodes(self, data: bytes, size: tuple[int, int]) -> bool:
        try:
            return self._decode(data).shape == (*size, 3)
        except RuntimeError:
            return False


def _refused(data: bytes, name: str, header: Header | None, fault: RunFault) -> tuple[State, str]:
    """Why an image is refused before it is decoded, and the detail."""
    if header is None:
        what = content_name(data)
        if what is None or what in ("HTML", "XML", "PDF", "gzip", "zip"):
            return State.NOT_AN_IMAGE, f"looks like {what}" if what else f"starts with {data[:8]!r}"
        return State.UNSUPPORTED_FORMAT, f"{what}; expected one of {', '.join(FORMATS)}"
    size = f"{header.width}x{header.height} pixels"
    if max(header.width, header.height) > LONGEST * min(header.width, header.height):
        return State.TOO_NARROW, f"{size}, one side is over {LONGEST} times the other"
    if header.width * header.height > MOST_PIXELS:
        return State.TOO_LARGE, f"{size}, more than {MOST_PIXELS:,}"
    return State.UNDECODABLE, str(fault).removeprefix(f"data: {name}: ")
