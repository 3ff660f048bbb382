"""What an examination says of a sample: whether it can be used, and what is unusual about it."""

from enum import IntEnum, IntFlag
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class State(IntEnum):
    """Whether a sample can be used, and if not, why."""

    PENDING = 0
    USABLE = 1
    MISSING = 2
    UNREADABLE = 3
    EMPTY = 4
    NOT_AN_IMAGE = 5
    UNSUPPORTED_FORMAT = 6
    TOO_LARGE = 7
    TOO_NARROW = 8
    TOO_SMALL = 9
    UNDECODABLE = 10
    CRASHES_THE_DECODER = 11
    DUPLICATE = 12

    @property
    def words(self) -> str:
        """For people: `not an image`."""
        return self.name.lower().replace("_", " ")


class Note(IntFlag):
    """What is unusual about an image that training can use all the same."""

    WRONG_EXTENSION = 1
    ROTATED = 2
    CMYK = 4
    DEEP = 8
    ANIMATED = 16
    TRANSPARENT = 32
    TRAILING = 64

    @property
    def words(self) -> str:
        """For people: `wrong extension`."""
        return str(self.name).lower().replace("_", " ")


MEANINGS = {
    Note.WRONG_EXTENSION: "the content is {format}",
    Note.ROTATED: "EXIF asks for a rotation, which training (like torchvision's ImageFolder) does not apply",
    Note.CMYK: "converted to RGB without a colour profile",
    Note.DEEP: "more than 8 bits a channel, of which training sees 8",
    Note.ANIMATED: "only the first frame is used",
    Note.TRANSPARENT: "the transparency is dropped, and the colours under it show",
    Note.TRAILING: "bytes behind the end of the image",
}


RECORD = np.dtype(
    [
        ("state", "u1"),  # a `State`
        ("notes", "u1"),  # a `Note`
        ("format", "S4"),  # as Pillow calls it; empty: unknown
        ("width", "<u4"),
        ("height", "<u4"),
        ("bytes", "<u4"),
        ("digest", "<u8", 2),  # the first half of the content's SHA-256
    ]
)
"""What is known of a sample after its examination, 34 bytes."""


class Details(NamedTuple):
    """Records [m] of a chunk's samples, and what more there is to say of those that cannot be used, by sample."""

    records: NDArray[np.void]
    said: dict[int, str]
