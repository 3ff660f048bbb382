"""Training batches of crops with masks: a pure function of seed and step, whatever the ranks, threads and resumes."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lut_ds.data.loader import Batch
from lut_ds.data.order import SampleOrder
from lut_ds.data.quarantine import BadSample
from lut_ds.data.rng import STREAM_DROP_PATH, stream_geometry, stream_photometric, uniforms
from lut_ds.errors import RunFault, UserError
from lut_ds.transfer.segmentation.augment import DRAWS, PHOTOMETRIC_DRAWS, Geometry, augment, distort
from lut_ds.transfer.segmentation.config import SegmentRecipe
from lut_ds.transfer.segmentation.folder import MaskedImages

_TRIES = 1000  # samples in a row that may be bad


@dataclass
class SegmentBatch(Batch):
    """One micro-batch of one rank; `views[0]` uint8 [b, S, S, 3]."""

    masks: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """uint8 [b, S, S]: classes, and 255."""
    seed: int = 0
    """Of stochastic depth and dropout."""


@dataclass
class _Crop:
    image: torch.Tensor
    mask: torch.Tensor
    sample: int
    bad: list[BadSample]


class SegmentLoader:
    """Micro-batches of rank `rank` for any range of global steps: a `StepLoader`.

    Samples and crops of a step depend neither on the world size nor on the threads. A sample that cannot be decoded is
    replaced by the next in the epoch's order. The last, incomplete global batch of an epoch is dropped.

    Args:
        images: to train on.
        recipe: `data`, `model.image_size`, `run.seed` and `train.global_batch` of it are read.
        micro_batch, rank, world_size: of this process; device: where batches are wanted.

    Raises:
        UserError: fewer images than a global batch.
    """

    def __init__(
        self,
        images: MaskedImages,
        recipe: SegmentRecipe,
        *,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        threads: int,
    ) -> None:
        data, batch = recipe.data, recipe.train.global_batch
        self.steps_per_epoch = len(images) // batch
        if not self.steps_per_epoch:
            raise UserError(
                f"train.global_batch: expected at most the {len(images)} training images of data.path, found {batch}; "
                "lower train.global_batch or add images"
            )
        self._images, self._seed = images, recipe.run.seed
        self._geometry = Geometry(recipe.model.image_size, data.scale, data.cat_max_ratio, data.hflip)
        self._photometric, self._prefetch, self._threads = data.photometric, data.prefetch, threads
        self._accumulation = batch // (micro_batch * world_size)
        self._micro_batch, self._rank, self._world_size = micro_batch, rank, world_size
        self._device, self._order = device, SampleOrder(len(images), recipe.run.seed)
        self._met: set[int] = set()
        self._not_taken: list[BadSample] = []
        self.seen = self.bad = 0

    def batches(self, start_step: int, stop_step: int) -> Iterator[SegmentBatch]:
        """Micro-batches of global steps [start_step, stop_step); RunFault when 1,000 samples in a row are bad."""
        waiting: deque[tuple[int, list[Future[_Crop]]]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="lut-ds-segment") as workers:
            try:
                for number in range(start_step * self._accumulation, stop_step * self._accumulation):
                    epoch, positions = self._place(number)
                    waiting.append((number, [workers.submit(self._crop, epoch, place) for place in positions]))
                    if len(waiting) > self._prefetch:
                        yield self._batch(*waiting.popleft())
                while waiting:
                    yield self._batch(*waiting.popleft())
            finally:
                workers.shutdown(cancel_futures=True)

    def names(self, samples: Sequence[int]) -> list[str]:
        """What to call samples in a message."""
        return [self._images.name(sample) for sample in samples]

    def take_bad(self) -> list[BadSample]:
        """The bad samples met for the first time since the last call, in the batches delivered."""
        taken, self._not_taken = self._not_taken, []
        return taken

    def _place(self, number: int) -> tuple[int, range]:
        """Epoch of a micro-batch, counted over the run, and this rank's positions in its order."""
        epoch, within = divmod(number, self.steps_per_epoch * self._accumulation)
        first = (within * self._world_size + self._rank) * self._micro_batch
        return epoch, range(first, first + self._micro_batch)

    def _crop(self, epoch: int, position: int) -> _Crop:
        bad: list[BadSample] = []
        for number in range(min(_TRIES, len(self._images))):
            place = (position + number) % len(self._images)
            drawn = self._order.samples(epoch, np.array([place]))
            sample = int(drawn[0])
            try:
                image, mask = self._images.load(sample)
            except RunFault as fault:
                bad.append(BadSample(self._images.name(sample), sample, epoch, place, str(fault)))
                continue
            draws = uniforms(self._seed, epoch, drawn, stream_geometry(0), DRAWS)[0].tolist()
            image, mask = augment(image, mask, draws, self._geometry)
            if self._photometric:
                draws = uniforms(self._seed, epoch, drawn, stream_photometric(0), PHOTOMETRIC_DRAWS)[0].tolist()
                image = distort(image, draws)
            return _Crop(torch.from_numpy(np.array(image)), torch.from_numpy(np.array(mask)), sample, bad)
        raise RunFault(
            f"data: {len(bad)} images in a row cannot be used, the last: {bad[-1].reason}; see what is there"
        )

    def _batch(self, number: int, crops: list[Future[_Crop]]) -> SegmentBatch:
        done = [crop.result() for crop in crops]
        self.seen += len(done)
        for found in (crop.bad for crop in done if crop.bad):
            self.bad += 1
            self._not_taken += [one for one in found if one.sample not in self._met]
            self._met |= {one.sample for one in found}
        drawn = np.array([number * self._world_size + self._rank])
        return SegmentBatch(
            [self._to_device(torch.stack([crop.image for crop in done]))],
            torch.empty(0),
            np.array([crop.sample for crop in done]),
            masks=self._to_device(torch.stack([crop.mask for crop in done])),
            seed=int(uniforms(self._seed, 0, drawn, STREAM_DROP_PATH, 1)[0, 0] * 2**53),
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        # From pageable memory the copy would wait for everything queued on the device.
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor
