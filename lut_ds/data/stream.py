"""From a plan of batches to tensors: bytes are read ahead by threads in the plan's order, and the pipeline is kept full."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import numpy as np
import torch
from numpy.typing import NDArray

from lut_ds.data.lent import OwnCopies
from lut_ds.data.patience import PatientReader
from lut_ds.data.pipeline import build_pipeline, pipeline_inputs
from lut_ds.data.quarantine import BadSample
from lut_ds.data.slots import Job, Slot, SlotFiller, Successors
from lut_ds.data.sources import Source
from lut_ds.data.tuning import DALI_DEFAULTS, GpuDecoder
from lut_ds.data.views import ViewParams, ViewSpec
from lut_ds.errors import RunFault

Draw = Callable[[int, NDArray[np.int64], NDArray[np.int32]], list[ViewParams]]  # epoch, samples, sizes -> one a view

_READ_CHUNK = 16  # files a task: enough to hide the cost of a task, few enough to spread a batch over the readers


@dataclass(frozen=True)
class Filled:
    """A batch as it is delivered."""

    epoch: int
    drawn: NDArray[np.int64]  # [b] the samples that the order has here
    samples: NDArray[np.int64]  # [b] those that are here: others where the drawn ones are bad
    views: list[torch.Tensor]  # each uint8 [b, S, S, 3]
    bad: list[BadSample]  # those passed over to fill it


@dataclass
class _Flight:
    """A batch on its way: the bytes are kept to find the culprits when it fails."""

    number: int
    epoch: int
    slots: list[Slot]
    bad: list[BadSample]  # of slots that were left out
    failed_without_culprit: bool = False


class ViewStream:
    """An iterator over the filled jobs of `plan`, in its order.

    `draw` gives the view parameters of a batch for its drawn samples, once the sizes [b, 2] of its images are known. A sample
    that cannot be read or decoded is replaced by the first valid one of its `successors`, and left out when there is none;
    with `successors` None it raises RunFault naming it when its batch is due: the batches before it are delivered first. So
    does storage that is away for `retry_seconds`. A batch that fails inside the pipeline is repaired and run again, and still
    delivered in its turn. `close()` (also at the end, on an error and on `with`) stops the readers and drops the pipeline.
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
        successors: Successors | None = None,
        retry_seconds: float = 0.0,
    ) -> None:
        self._views, self._draw = views, draw
        self._plan = enumerate(plan)
        self._prefetch = prefetch
        next_inputs = WeakMethod(self._next_inputs)  # DALI keeps its source in a circle that Python cannot collect
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="lut-ds-resize")
        device_id = _device_id(device)
        self._pipe: Any = build_pipeline(
            views,
            image_size,
            lambda: next_inputs()(),  # type: ignore[misc]  # the stream outlives its pipeline
            batch_size=batch_size,
            threads=threads,
            device_id=device_id,
            prefetch=prefetch,
            gpu_decoder=gpu_decoder,
            parallel_map=self._workers.map if threads > 1 else map,
        )
        self._copies = OwnCopies() if device_id is not None else None
        self._reader = PatientReader(source, retry_seconds, setting="data.retry_seconds")
        self._filler = SlotFiller(source, self._reader, successors, device_id)
        self._readers = ThreadPoolExecutor(min(32, 4 * threads), thread_name_prefix="lut-ds-read")
        self._reading: deque[tuple[int, Job, list[Future[list[Slot]]]]] = deque()
        self._repaired: deque[_Flight] = deque()
        self._flying: deque[_Flight] = deque()  # in the pipeline, in its order
        self._landed: dict[int, Filled] = {}  # by number: those that wait for an earlier one
        self._due = 0
        self._fault: Exception | None = None

    def __iter__(self) -> "ViewStream":
        return self

    def __next__(self) -> Filled:
        if self._pipe is None:
            raise StopIteration
        try:
            while self._due not in self._landed:
                self._advance()
        except BaseException:
            self.close()
            raise
        self._due += 1
        return self._landed.pop(self._due - 1)

    def __enter__(self) -> "ViewStream":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers and drop the pipeline; may be called again."""
        self._reader.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        for queue in (self._reading, self._repaired, self._flying, self._landed):
            queue.clear()
        if self._copies is not None:
            self._copies.close()
        self._pipe = None  # waits for the batch it is working on, which needs the workers
        self._workers.shutdown()

    def _advance(self) -> None:
        """Start what fits into the pipeline, and take its oldest batch out."""
        self._pipe.schedule_run()  # calls _next_inputs until `prefetch` batches are under way
        if self._flying:
            flight = self._flying.popleft()
            try:
                views = self._take()
            except RuntimeError as error:
                self._repair(flight, error)
            else:
                self._land(flight, views)
        elif self._due not in self._landed:
            raise self._fault or StopIteration

    def _next_inputs(self) -> dict[str, Any]:
        """The pipeline's inputs for the next batch; StopIteration after the last one or before a faulty one."""
        if self._repaired:
            return self._take_off(self._repaired.popleft())
        while True:
            self._read_ahead()
            if self._fault is not None or not self._reading:
                raise StopIteration
            number, job, chunks = self._reading.popleft()
            self._read_ahead()
            try:
                flight = _Flight(number, job.epoch, [slot for chunk in chunks for slot in chunk.result()], [])
            except RunFault as fault:
                self._fault = fault
                raise StopIteration from fault
            self._leave_out(flight)
            if flight.slots:
                return self._take_off(flight)

    def _read_ahead(self) -> None:
        """Keep as many batches being read as the pipeline holds."""
        while len(self._reading) < self._prefetch:
            number, job = next(self._plan, (-1, None))
            if job is None:
                return
            parts = [slice(i, i + _READ_CHUNK) for i in range(0, len(job.samples), _READ_CHUNK)]
            self._reading.append((number, job, [self._readers.submit(self._filler.fill, job, part) for part in parts]))

    def _take_off(self, flight: _Flight) -> dict[str, Any]:
        drawn = np.array([slot.drawn for slot in flight.slots], np.int64)
        sizes_hw = np.array([slot.hw for slot in flight.slots], np.int32)
        encoded = [slot.data for slot in flight.slots]
        inputs = pipeline_inputs(self._views, encoded, sizes_hw, self._draw(flight.epoch, drawn, sizes_hw))
        self._flying.append(flight)
        return inputs

    def _take(self) -> list[torch.Tensor]:
        """The oldest batch of the pipeline as tensors that own their memory."""
        outputs = self._pipe.share_outputs()
        views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        self._pipe.release_outputs()
        return views if self._copies is None else self._copies.take(views)

    def _repair(self, flight: _Flight, error: RuntimeError) -> None:
        """Replace what does not decode in a batch that failed, and have it run again; once more too if all of it decodes."""
        if not self._filler.replace_undecodable(flight.slots):
            if flight.failed_without_culprit:
                names = f"{flight.slots[0].sample} and {len(flight.slots) - 1} more"
                raise RunFault(f"data: a batch of sample {names} failed twice, though each decodes: {error}") from error
            flight.failed_without_culprit = True
        self._leave_out(flight)
        if flight.slots:
            self._repaired.append(flight)
            self._pipe.reset()  # which had come to the end of the plan, perhaps

    def _leave_out(self, flight: _Flight) -> None:
        """Drop the slots that nothing is left to fill with; a batch of none is delivered as such."""
        flight.bad += [bad for slot in flight.slots if not slot.data for bad in slot.bad]
        flight.slots = [slot for slot in flight.slots if slot.data]
        if not flight.slots:
            self._land(flight, [])

    def _land(self, flight: _Flight, views: list[torch.Tensor]) -> None:
        drawn = np.array([slot.drawn for slot in flight.slots], np.int64)
        samples = np.array([slot.sample for slot in flight.slots], np.int64)
        bad = flight.bad + [bad for slot in flight.slots for bad in slot.bad]
        self._landed[flight.number] = Filled(flight.epoch, drawn, samples, views, bad)


def _device_id(device: torch.device) -> int | None:
    """DALI's name of the device: None for anything but a GPU, which then gets its views from the CPU pipeline."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
