"""Training batches of fine-tuning: crops, RandAugment, erasures and mixing, all functions of (seed, epoch, sample or step).

RandAugment works on PIL images in threads. With it, images are decoded and cropped on the CPU and go to the training device
afterwards; without it they are decoded there.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lut_ds.data.erasing import Erasure, draw_erasures
from lut_ds.data.loader import Batch, PretrainLoader
from lut_ds.data.randaugment import apply_randaugment, draw_randaugment, parse_randaugment
from lut_ds.data.rng import STREAM_DROP_PATH, STREAM_MIXING, uniforms
from lut_ds.data.sources import Source
from lut_ds.data.views import ViewSpec
from lut_ds.method.pixels import IMAGENET_MEAN
from lut_ds.transfer.config import FinetuneRecipe
from lut_ds.transfer.mixing import Mixing, draw_mixing

_RED, _GREEN, _BLUE = (min(255, round(255 * mean)) for mean in IMAGENET_MEAN)
FILL = (_RED, _GREEN, _BLUE)  # of what RandAugment uncovers
_CHUNK = 8  # images a task


@dataclass
class FinetuneBatch(Batch):
    """One micro-batch of one rank; `views[0]` uint8 [b, S, S, 3] after RandAugment, on the training device."""

    labels: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # [b], likewise
    erasures: list[Erasure] = field(default_factory=list)
    mixing: Mixing = field(default_factory=Mixing)
    seed: int = 0  # of stochastic depth


class FinetuneLoader(PretrainLoader):
    """Micro-batches of rank `rank` for any range of global steps, as PretrainLoader's, with labels and augmentation.

    Args:
        source: labelled images.
        recipe: `data`, `augment`, `model.image_size`, `run.seed` and `train.global_batch` of it are read.
        micro_batch, rank, world_size: of this process.
        device: where batches are wanted.
        loading: threads, prefetch and gpu_decoder of PretrainLoader.
    """

    def __init__(
        self,
        source: Source,
        recipe: FinetuneRecipe,
        *,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        loading: dict[str, Any],
    ) -> None:
        data, augment = recipe.data, recipe.augment
        on_cpu = augment.randaugment != "none"
        super().__init__(
            source,
            [ViewSpec("random_resized_crop", scale=data.crop_scale, hflip=data.hflip)],
            image_size=recipe.model.image_size,
            num_patches=1,
            seed=recipe.run.seed,
            global_batch=recipe.train.global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            device=torch.device("cpu") if on_cpu else device,
            retry_seconds=data.retry_seconds,
            **loading,
        )
        self._augment, self._wanted = augment, device
        self._randaugment = parse_randaugment(augment.randaugment) if on_cpu else None

    def batches(self, start_step: int, stop_step: int) -> Iterator[FinetuneBatch]:
        """See PretrainLoader; RandAugment of the next batches runs in threads beside the step."""
        plain = super().batches(start_step, stop_step)
        waiting: deque[tuple[int, Batch, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="lut-ds-augment") as workers:
            try:
                for number, batch in enumerate(plain, start_step * self.accumulation):
                    waiting.append((number, batch, self._start(number, batch, workers)))
                    if len(waiting) > self._prefetch:
                        yield self._finish(*waiting.popleft())
                while waiting:
                    yield self._finish(*waiting.popleft())
            finally:
                workers.shutdown(cancel_futures=True)
                plain.close()  # type: ignore[attr-defined]  # it is a generator

    def _start(self, number: int, batch: Batch, workers: ThreadPoolExecutor) -> list[Future[None]]:
        if self._randaugment is None:
            return []
        operators = draw_randaugment(self._randaugment, self._seed, self._epoch(number), batch.samples)
        pixels = batch.views[0] = batch.views[0].clone()  # the pipeline's own memory is not ours to change
        array = pixels.numpy()

        def augment(part: range) -> None:
            for i in part:
                array[i] = apply_randaugment(array[i], operators[i], FILL)

        count = len(operators)
        return [workers.submit(augment, range(i, min(i + _CHUNK, count))) for i in range(0, count, _CHUNK)]

    def _finish(self, number: int, batch: Batch, augmented: list[Future[None]]) -> FinetuneBatch:
        for part in augmented:
            part.result()
        a, side, epoch = self._augment, self._image_size, self._epoch(number)
        drawn = np.array([number * self._world_size + self._rank])
        random = np.random.Generator(
            np.random.Philox(key=[self._seed, STREAM_MIXING], counter=[0, 0, 0, int(drawn[0])])
        )
        labels = torch.tensor([self._source.label(sample) for sample in batch.samples.tolist()], dtype=torch.int64)
        return FinetuneBatch(
            [self._to_device(batch.views[0])],
            batch.noise,
            batch.samples,
            labels=self._to_device(labels),
            erasures=draw_erasures(a.erasing, side, self._seed, epoch, batch.samples),
            mixing=draw_mixing(random, side, a.mixup, a.cutmix, a.mix_prob, a.switch_prob),
            seed=int(uniforms(self._seed, 0, drawn, STREAM_DROP_PATH, 1)[0, 0] * 2**53),
        )

    def _epoch(self, number: int) -> int:
        """The epoch of a micro-batch, counted from the start of the run."""
        return number // (self.accumulation * self.steps_per_epoch)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._wanted == tensor.device or self._wanted.type == "cpu":
            return tensor
        # From pageable memory the copy would wait for everything queued on the device.
        return (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(self._wanted, non_blocking=True)
