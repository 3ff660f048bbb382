"""From a plan of batches to tensors: bytes are read ahead by threads in the plan's order, and the pipeline is kept full."""

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lut_ds.data.pipeline import build_pipeline, decode_one, pipeline_inputs
from lut_ds.data.sources import Source
from lut_ds.data.tuning import DALI_DEFAULTS, GpuDecoder
from lut_ds.data.views import ViewParams, ViewSpec
from lut_ds.errors import RunFault

Job = tuple[int, NDArray[np.int64]]  # epoch and samples of one batch
Draw = Callable[[int, NDArray[np.int64], NDArray[np.int32]], list[ViewParams]]  # epoch, samples, sizes -> one a view

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # what the pipeline decodes
_READ_CHUNK = 16  # files a task: enough to hide the cost of a task, few enough to spread a batch over the readers
_LONGEST = 1024  # times the shorter side: a longer image would be gigabytes once its shorter side is resized
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257


@dataclass
class _Flight:
    """A batch inside the pipeline; the bytes are kept to find the culprit when it fails."""

    job: Job
    encoded: list[bytes]


class ViewStream:
    """An iterator over (epoch, samples, views) for every job of `plan`, in its order; views are uint8 [b, S, S, 3].

    `draw` gives the view parameters of a batch once the sizes [b, 2] of its images are known. A file that cannot be read or
    decoded raises RunFault naming it when its batch is due: the batches before it are delivered first. `close()` (also at
    the end, on an error and on `with`) stops the readers and drops the pipeline.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[ViewSpec],
        image_size: int,
        plan: Iterator[Job],
        draw: Draw,
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int,
        gpu_decoder: GpuDecoder = DALI_DEFAULTS,
    ) -> None:
        self._source, self._views, self._plan, self._draw = source, views, plan, draw
        self._prefetch = prefetch
        next_inputs = WeakMethod(self._next_inputs)  # DALI keeps its source in a circle that Python cannot collect
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="lut-ds-resize")
        self._pipe: Any = build_pipeline(
            views,
            image_size,
            lambda: next_inputs()(),  # type: ignore[misc]  # the stream outlives its pipeline
            batch_size=batch_size,
            threads=threads,
            device_id=_device_id(device),
            prefetch=prefetch,
            gpu_decoder=gpu_decoder,
            parallel_map=self._workers.map if threads > 1 else map,
        )
        self._readers = ThreadPoolExecutor(min(32, 4 * threads), thread_name_prefix="lut-ds-read")
        self._reading: deque[tuple[Job, list[Future[list[tuple[bytes, tuple[int, int]]]]]]] = deque()
        self._flying: deque[_Flight] = deque()
        self._fault: Exception | None = None

    def __iter__(self) -> "ViewStream":
        return self

    def __next__(self) -> tuple[int, NDArray[np.int64], list[torch.Tensor]]:
        if self._pipe is None:
            raise StopIteration
        try:
            self._pipe.schedule_run()  # calls _next_inputs until `prefetch` batches are under way
            if not self._flying:
                raise self._fault or StopIteration
            flight = self._flying.popleft()
            return *flight.job, self._take(flight)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ViewStream":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers and drop the pipeline; may be called again."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._reading.clear()
        self._flying.clear()
        self._pipe = None  # waits for the batch it is working on, which needs the workers
        self._workers.shutdown()

    def _next_inputs(self) -> dict[str, Any]:
        """The pipeline's inputs for the next batch of the plan; StopIteration after the last one or before a faulty one."""
        self._read_ahead()
        if self._fault is not None or not self._reading:
            raise StopIteration
        job, chunks = self._reading.popleft()
        self._read_ahead()
        try:
            items = [item for chunk in chunks for item in chunk.result()]
        except RunFault as fault:
            self._fault = fault
            raise StopIteration from fault
        encoded = [data for data, _ in items]
        sizes_hw = np.array([size for _, size in items], np.int32)
        self._flying.append(_Flight(job, encoded))
        return pipeline_inputs(self._views, encoded, sizes_hw, self._draw(*job, sizes_hw))

    def _read_ahead(self) -> None:
        """Keep as many batches being read as the pipeline holds."""
        while len(self._reading) < self._prefetch:
            job = next(self._plan, None)
            if job is None:
                return
            samples = job[1]
            parts = [samples[i : i + _READ_CHUNK] for i in range(0, len(samples), _READ_CHUNK)]
            self._reading.append((job, [self._readers.submit(self._read, part) for part in parts]))

    def _read(self, samples: NDArray[np.int64]) -> list[tuple[bytes, tuple[int, int]]]:
        items = []
        for sample in samples.tolist():
            data = self._source.read(sample)
            items.append((data, image_hw(data, self._source.name(sample))))
        return items

    def _take(self, flight: _Flight) -> list[torch.Tensor]:
        """The oldest batch of the pipeline as tensors that own their memory."""
        try:
            outputs = self._pipe.share_outputs()
        except RuntimeError as error:
            raise self._culprit(flight, error) from error
        views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        self._pipe.release_outputs()
        return views

    def _culprit(self, flight: _Flight, error: RuntimeError) -> RunFault:
        """The fault of the first file of the batch that does not decode on its own."""
        samples = flight.job[1].tolist()
        for sample, data in zip(samples, flight.encoded):
            try:
                decode_one(data)
            except RuntimeError:
                return RunFault(f"data: {self._source.name(sample)}: cannot be decoded: {_reason(data)}")
        return RunFault(f"data: a batch of {self._source.name(samples[0])} and {len(samples) - 1} more failed: {error}")


def _device_id(device: torch.device) -> int | None:
    """DALI's name of the device: None for anything but a GPU, which then gets its views from the CPU pipeline."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def image_hw(data: bytes, name: str) -> tuple[int, int]:
    """Height and width that an encoded image decodes to (EXIF not applied); RunFault naming it when it is not an image."""
    if not data:
        raise RunFault(f"data: {name}: expected an image, found an empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            height, width = image.height, image.width
            if image.format == "TIFF":  # Pillow reports the size after its orientation tag, which nothing here applies
                tags: Any = image.tag_v2  # type: ignore[attr-defined]
                height, width = int(tags[_TIFF_HEIGHT]), int(tags[_TIFF_WIDTH])
    except Image.DecompressionBombError as error:
        raise RunFault(f"data: {name}: {error}") from error
    except (OSError, SyntaxError, ValueError, KeyError) as error:  # KeyError: a TIFF without its size
        found = f"expected one of {', '.join(_FORMATS)}, found something that starts with {data[:8]!r}"
        raise RunFault(f"data: {name}: {found}") from error
    if max(height, width) > _LONGEST * min(height, width):
        raise RunFault(f"data: {name}: expected sides of at most 1 to {_LONGEST}, found {width}x{height}")
    return height, width


def _reason(data: bytes) -> str:
    """Why an image does not decode, in Pillow's words."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        return str(error)
    return "the decoder does not support it"
