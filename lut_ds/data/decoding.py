"""One decoder for many images, one at a time: what checks, measures or repacks files decodes them as training does."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.pipeline import decode_each


class Decoder:
    """The CPU decoder of the training pipeline, kept from image to image; a failure does not spoil it.

    Building the pipeline costs ten small decodes, which is why this exists beside `decode_one`. For one thread.
    """

    def __init__(self) -> None:
        self._data = b""
        self._found = decode_each(self._feed())

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """The pixels uint8 [H, W, 3]; RuntimeError when the image cannot be decoded."""
        self._data = data
        found = next(self._found)
        if isinstance(found, RuntimeError):
            raise found
        return found

    def _feed(self) -> Iterator[bytes]:
        while True:
            yield self._data
