"""The loaders: which samples make up each micro-batch of each rank, and their views on the training device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lut_ds.data.order import Order, SampleOrder
from lut_ds.data.quarantine import BadSample
from lut_ds.data.rng import STREAM_DEGRADATION, STREAM_MASK, uniforms32
from lut_ds.data.slots import Job
from lut_ds.data.sources import Source
from lut_ds.data.stream import Filled, ViewStream
from lut_ds.data.tuning import DALI_DEFAULTS, GpuDecoder
from lut_ds.data.views import EVAL_VIEW, ViewParams, ViewSpec, eval_params, view_params
from lut_ds.errors import RunFault, UserError

_SEARCH = 16  # positions looked up at a time for a replacement


@dataclass
class Batch:
    """One micro-batch of one rank."""

    views: list[torch.Tensor]  # each uint8 [b, S, S, 3] on the training device
    noise: torch.Tensor  # float32 [b, L] uniform draws for the mask, on the training device
    samples: NDArray[np.int64]  # [b] whose pixels these are
    draws: torch.Tensor | None = None  # float32 [b, k] uniform draws for the degradation of the views, likewise


class StepLoader(Protocol):
    """What the training loop reads micro-batches from; PretrainLoader says what each of these is."""

    steps_per_epoch: int
    seen: int
    bad: int

    def batches(self, start_step: int, stop_step: int) -> Iterator[Any]: ...
    def names(self, samples: Sequence[int]) -> list[str]: ...
    def take_bad(self) -> list[BadSample]: ...


class PretrainLoader:
    """Micro-batches of rank `rank` for any range of global steps; a pure function of the seed and the step.

    Step s is in-epoch step k = s % steps_per_epoch of epoch s // steps_per_epoch and takes positions [k*G, (k+1)*G) of that
    epoch's order; micro-batch m of rank r takes [k*G + m*W*b + r*b, + b). So the samples and pixels of a step depend neither on
    the world size W nor on the threads, and a run resumes from one integer. The last, incomplete global batch of an epoch
    is dropped. `order` is a global shuffle unless given. Raises UserError when the batch sizes do not divide or the source is
    smaller than one global batch.

    A sample that cannot be read or decoded is replaced by the first valid one at the positions that follow in the epoch's
    order, the first position following the last. View parameters and mask stay those of the sample that the order has
    there, so that the replacement is seen in other views than at its own position. That too is a pure function, of the
    order and of which samples are bad.

    Attributes:
        seen: samples of the batches delivered by this object, bad ones included.
        bad: how many of those were bad.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[ViewSpec],
        *,
        image_size: int,
        num_patches: int,
        num_draws: int = 0,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        threads: int,
        prefetch: int = 2,
        gpu_decoder: GpuDecoder = DALI_DEFAULTS,
        order: Order | None = None,
        retry_seconds: float = 0.0,
    ) -> None:
        self.accumulation, rest = divmod(global_batch, micro_batch * world_size)
        if rest or not self.accumulation:
            raise UserError(
                f"train.global_batch: expected a multiple of train.micro_batch x world size = {micro_batch} x {world_size}, "
                f"found {global_batch}; change one of the three"
            )
        self.steps_per_epoch = len(source) // global_batch
        if not self.steps_per_epoch:
            raise UserError(
                f"train.global_batch: expected at most the {len(source)} images of data.path, found {global_batch}; "
                "lower train.global_batch or add images"
            )
        self._source, self._views = source, list(views)
        self._image_size, self._num_patches, self._num_draws = image_size, num_patches, num_draws
        self._seed, self._order = seed, order or SampleOrder(len(source), seed)
        self._micro_batch, self._rank, self._world_size = micro_batch, rank, world_size
        self._device, self._threads, self._prefetch = device, threads, prefetch
        self._gpu_decoder = gpu_decoder
        self._retry_seconds = retry_seconds
        self._streams: list[ViewStream] = []
        self._met: dict[int, BadSample] = {}
        self._not_taken: list[BadSample] = []
        self.seen = self.bad = 0

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Micro-batches of global steps [start_step, stop_step), `accumulation` a step.

        RunFault when nothing can be read for `retry_seconds`, or 1,000 samples in a row are bad.
        """
        stream = ViewStream(
            self._source,
            self._views,
            self._image_size,
            self._plan(start_step, stop_step),
            self._draw,
            batch_size=self._micro_batch,
            device=self._device,
            threads=self._threads,
            prefetch=self._prefetch,
            gpu_decoder=self._gpu_decoder,
            successors=self._successors,
            retry_seconds=self._retry_seconds,
        )
        self._streams.append(stream)
        try:
            for filled in stream:
                epoch, drawn = filled.epoch, filled.drawn
                noise = self._uniform(epoch, drawn, STREAM_MASK, self._num_patches)
                draws = self._uniform(epoch, drawn, STREAM_DEGRADATION, self._num_draws) if self._num_draws else None
                self._count(filled)
                yield Batch(filled.views, noise, filled.samples, draws)
        finally:
            stream.close()
            self._streams.remove(stream)

    def names(self, samples: Sequence[int]) -> list[str]:
        """What to call samples in a message."""
        return [self._source.name(sample) for sample in samples]

    def take_bad(self) -> list[BadSample]:
        """The bad samples met for the first time since the last call, in the batches delivered."""
        taken, self._not_taken = self._not_taken, []
        return taken

    def close(self) -> None:
        """Stop every iteration that is still open."""
        for stream in self._streams:
            stream.close()

    def __enter__(self) -> "PretrainLoader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _uniform(self, epoch: int, samples: NDArray[np.int64], stream: int, count: int) -> torch.Tensor:
        """float32 [b, count] on the training device."""
        values = torch.from_numpy(uniforms32(self._seed, epoch, samples, stream, count))
        # From pageable memory the copy would wait for everything queued on the device.
        return values.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else values

    def _plan(self, start_step: int, stop_step: int) -> Iterator[Job]:
        b, world = self._micro_batch, self._world_size
        for step in range(start_step, stop_step):
            epoch, k = divmod(step, self.steps_per_epoch)
            for m in range(self.accumulation):
                first = ((k * self.accumulation + m) * world + self._rank) * b
                positions = np.arange(first, first + b)
                yield Job(epoch, positions, self._order.samples(epoch, positions))

    def _successors(self, epoch: int, position: int) -> Iterator[tuple[int, int]]:
        """The positions after `position` and their samples, once around."""
        n = len(self._source)
        for start in range(position + 1, position + n, _SEARCH):
            positions = np.arange(start, min(start + _SEARCH, position + n)) % n
            yield from zip(positions.tolist(), self._order.samples(epoch, positions).tolist())
        raise RunFault(f"data: none of the {n} images of data.path can be used; see what it holds")

    def _count(self, filled: Filled) -> None:
        self.seen += len(filled.drawn)
        self.bad += int((filled.drawn != filled.samples).sum())
        for bad in filled.bad:
            if bad.sample not in self._met:
                self._met[bad.sample] = bad
                self._not_taken.append(bad)

    def _draw(self, epoch: int, samples: NDArray[np.int64], sizes_hw: NDArray[np.int32]) -> list[ViewParams]:
        return [
            view_params(spec, self._image_size, self._seed, epoch, samples, i, sizes_hw)
            for i, spec in enumerate(self._views)
        ]


class EvalLoader:
    """Every image once, in order: Resize(int(S / crop), shorter side, bicubic) + CenterCrop(S), and its label.

    Iterating yields (uint8 [b, S, S, 3] on `device`, int64 labels [b] on the CPU); the last batch may be smaller. `indices`
    picks samples of the source, in the given order. A sample that cannot be read or decoded is a RunFault naming it, because
    an evaluation on other images is another evaluation; with `skip_bad` it is left out of its batch and listed in `bad`.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        batch_size: int,
        threads: int,
        indices: Sequence[int] | NDArray[np.int64] | None = None,
        *,
        device: torch.device | None = None,
        prefetch: int = 2,
        skip_bad: bool = False,
        retry_seconds: float = 60.0,
        crop: float = 0.875,
    ) -> None:
        self._source, self._image_size, self._batch_size = source, image_size, batch_size
        self._threads, self._prefetch, self._crop = threads, prefetch, crop
        self._skip_bad, self._retry_seconds = skip_bad, retry_seconds
        self._samples = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
        self._device = torch.device("cpu") if device is None else device
        self.bad: list[BadSample] = []  # of the last iteration

    def __len__(self) -> int:
        return -(-len(self._samples) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        def draw(epoch: int, samples: NDArray[np.int64], sizes_hw: NDArray[np.int32]) -> list[ViewParams]:
            return [eval_params(self._image_size, sizes_hw, self._crop)]

        self.bad = []
        stream = ViewStream(
            self._source,
            [EVAL_VIEW],
            self._image_size,
            self._plan(),
            draw,
            batch_size=self._batch_size,
            device=self._device,
            threads=self._threads,
            prefetch=self._prefetch,
            successors=_nothing if self._skip_bad else None,
            retry_seconds=self._retry_seconds,
        )
        with stream:
            for filled in stream:
                self.bad += filled.bad
                if filled.views:
                    labels = [self._source.label(sample) for sample in filled.samples.tolist()]
                    yield filled.views[0], torch.tensor(labels, dtype=torch.int64)

    def _plan(self) -> Iterator[Job]:
        for first in range(0, len(self._samples), self._batch_size):
            samples = self._samples[first : first + self._batch_size]
            yield Job(0, np.arange(first, first + len(samples)), samples)


def _nothing(epoch: int, position: int) -> Iterator[tuple[int, int]]:
    """No sample may stand in for another."""
    return iter(())
