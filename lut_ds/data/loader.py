"""The loaders: which samples make up each micro-batch of each rank, and their views on the training device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lut_ds.data.order import Order, SampleOrder
from lut_ds.data.rng import STREAM_DEGRADATION, STREAM_MASK, uniforms32
from lut_ds.data.sources import Source
from lut_ds.data.stream import Job, ViewStream
from lut_ds.data.tuning import DALI_DEFAULTS, GpuDecoder
from lut_ds.data.views import EVAL_VIEW, ViewParams, ViewSpec, eval_params, view_params
from lut_ds.errors import UserError


@dataclass
class Batch:
    """One micro-batch of one rank."""

    views: list[torch.Tensor]  # each uint8 [b, S, S, 3] on the training device
    noise: torch.Tensor  # float32 [b, L] uniform draws for the mask, on the training device
    samples: NDArray[np.int64]  # [b]
    draws: torch.Tensor | None = None  # float32 [b, k] uniform draws for the degradation of the views, likewise


class PretrainLoader:
    """Micro-batches of rank `rank` for any range of global steps; a pure function of the seed and the step.

    Step s is in-epoch step k = s % steps_per_epoch of epoch s // steps_per_epoch and takes positions [k*G, (k+1)*G) of that
    epoch's order; micro-batch m of rank r takes [k*G + m*W*b + r*b, + b). So the samples and pixels of a step depend neither on
    the world size W nor on the threads, and a run resumes from one integer. The last, incomplete global batch of an epoch
    is dropped. `order` is a global shuffle unless given. Raises UserError when the batch sizes do not divide or the source is
    smaller than one global batch.
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
        self._streams: list[ViewStream] = []

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Micro-batches of global steps [start_step, stop_step), `accumulation` a step; RunFault names an unusable file."""
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
        )
        self._streams.append(stream)
        try:
            for epoch, samples, views in stream:
                noise = self._uniform(epoch, samples, STREAM_MASK, self._num_patches)
                draws = self._uniform(epoch, samples, STREAM_DEGRADATION, self._num_draws) if self._num_draws else None
                yield Batch(views, noise, samples, draws)
        finally:
            stream.close()
            self._streams.remove(stream)

    def names(self, samples: Sequence[int]) -> list[str]:
        """What to call samples in a message."""
        return [self._source.name(sample) for sample in samples]

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
                yield epoch, self._order.samples(epoch, np.arange(first, first + b))

    def _draw(self, epoch: int, samples: NDArray[np.int64], sizes_hw: NDArray[np.int32]) -> list[ViewParams]:
        return [
            view_params(spec, self._image_size, self._seed, epoch, samples, i, sizes_hw)
            for i, spec in enumerate(self._views)
        ]


class EvalLoader:
    """Every image once, in order: Resize(int(S / 0.875), shorter side, bicubic) + CenterCrop(S), and its label.

    Iterating yields (uint8 [b, S, S, 3] on `device`, int64 labels [b] on the CPU); the last batch may be smaller. `indices`
    picks samples of the source, in the given order.
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
    ) -> None:
        self._source, self._image_size, self._batch_size = source, image_size, batch_size
        self._threads, self._prefetch = threads, prefetch
        self._samples = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
        self._device = torch.device("cpu") if device is None else device

    def __len__(self) -> int:
        return -(-len(self._samples) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        def draw(epoch: int, samples: NDArray[np.int64], sizes_hw: NDArray[np.int32]) -> list[ViewParams]:
            return [eval_params(self._image_size, sizes_hw)]

        stream = ViewStream(
            self._source,
            [EVAL_VIEW],
            self._image_size,
            ((0, self._samples[i : i + self._batch_size]) for i in range(0, len(self._samples), self._batch_size)),
            draw,
            batch_size=self._batch_size,
            device=self._device,
            threads=self._threads,
            prefetch=self._prefetch,
        )
        with stream:
            for _, samples, (view,) in stream:
                labels = [self._source.label(sample) for sample in samples.tolist()]
                yield view, torch.tensor(labels, dtype=torch.int64)
