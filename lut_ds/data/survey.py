"""The headers of samples, read in worker processes: sizes, formats, bytes, and for a few what decoding them costs."""

import time

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.decoding import Decoder
from lut_ds.data.headers import read_header
from lut_ds.data.sources import Source
from lut_ds.data.stats import MEASURE
from lut_ds.data.validity import image_hw
from lut_ds.errors import RunFault


class Surveyor:
    """Measures chunks of samples of one source; every `timed`th sample is decoded too."""

    def __init__(self, source: Source, timed: int) -> None:
        self._source, self._timed, self._decode = source, timed, Decoder()
        self._warm = False

    def __call__(self, samples: NDArray[np.int64]) -> NDArray[np.void]:
        """Measure int64 `samples` [m]: MEASURE records [m], with a width of 0 for those that cannot be read."""
        found = np.zeros(len(samples), MEASURE)
        for record, sample in zip(found, samples.tolist()):
            name = self._source.name(sample)
            try:
                data = self._source.read(sample)
            except RunFault:
                continue
            record["bytes"] = len(data)
            header = read_header(data, name)
            if header is None:
                continue
            record["width"], record["height"], record["format"] = header.width, header.height, header.format
            record["mode"], record["sampling"] = header.mode, header.sampling or ""
            if sample % self._timed == 0:
                record["seconds"] = self._cost(data, name)
        return found

    def _cost(self, data: bytes, name: str) -> float:
        """Seconds of CPU that decoding takes; 0 when it fails."""
        try:
            image_hw(data, name)
            if not self._warm:
                self._warm = bool(self._decode(data).size)  # the first image pays for what all share
            start = time.process_time()
            self._decode(data)
            return time.process_time() - start
        except (RunFault, RuntimeError):
            return 0.0
