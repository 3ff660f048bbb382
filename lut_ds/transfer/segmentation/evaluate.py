"""mIoU on validation images, exact over ranks: every pixel counts once, however unevenly the ranks share the images."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lut_ds.engine.launch import Ranks
from lut_ds.transfer.segmentation.augment import fitted_size
from lut_ds.transfer.segmentation.folder import MaskedImages
from lut_ds.transfer.segmentation.miou import confusion, scores
from lut_ds.transfer.segmentation.sliding import Logits, classes_at, passes, slide

_AHEAD = 4  # images decoded ahead, a thread


@dataclass(frozen=True)
class Windows:
    """How an image is covered: windows of `side`, `stride` apart, `batch` a forward pass; its shorter side becomes `side`."""

    side: int
    stride: int
    batch: int

    def passes(self, size: tuple[int, int]) -> int:
        """Forward passes that an image of (height, width) takes."""
        return passes(*fitted_size(*size, self.side), self.side, self.stride, self.batch)


def own_share(images: int, ranks: Ranks) -> list[int]:
    """The images that this rank evaluates."""
    return list(range(ranks.rank, images, ranks.world_size))


@torch.no_grad()
def evaluate(
    logits: Logits,
    images: MaskedImages,
    classes: int,
    windows: Windows,
    ranks: Ranks,
    threads: int,
    pictures: int = 0,
) -> tuple[dict[str, Any], dict[int, NDArray[np.uint8]]]:
    """Evaluate on all images; a collective, in which every rank runs the same number of forward passes, as ZeRO-3 needs.

    Args:
        logits: uint8 [b, S, S, 3] on the ranks' device -> float32 [b, classes, S, S].
        pictures: so many first images' predictions are returned.

    Returns:
        `scores` with `images`; and predictions uint8 [H, W] by image, on rank 0.

    Raises:
        RunFault: an image that cannot be decoded: an evaluation on other images is another evaluation.
    """
    matrix = torch.zeros((classes, classes), dtype=torch.int64, device=ranks.device)
    shown: dict[int, NDArray[np.uint8]] = {}
    indices = own_share(len(images), ranks)
    left = _most_passes(images, indices, windows, ranks)
    for i, pixels, truth in _decoded(images, indices, windows.side, threads):
        on_device = pixels.to(ranks.device)
        found = slide(logits, on_device, windows.side, windows.stride, windows.batch)
        left -= windows.passes((truth.shape[0], truth.shape[1]))
        predicted = classes_at(found, *truth.shape)
        matrix += confusion(predicted, truth.to(ranks.device), classes)
        if i < pictures:
            shown[i] = predicted.cpu().numpy().astype(np.uint8)
    blank = torch.zeros((windows.batch, windows.side, windows.side, 3), dtype=torch.uint8, device=ranks.device)
    for _ in range(left):
        logits(blank)
    if ranks.world_size > 1:
        dist.all_reduce(matrix)
        every: list[dict[int, NDArray[np.uint8]]] = [{}] * ranks.world_size
        dist.all_gather_object(every, shown)
        shown = {i: prediction for one in every for i, prediction in one.items()}
    return {**scores(matrix.cpu()), "images": len(images)}, shown


def _most_passes(images: MaskedImages, indices: list[int], windows: Windows, ranks: Ranks) -> int:
    """Forward passes of the rank that has most."""
    if ranks.world_size == 1:
        return 0
    most = torch.tensor([sum(windows.passes(images.size(i)) for i in indices)], device=ranks.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _decoded(images: MaskedImages, indices: list[int], side: int, threads: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index, uint8 [h, w, 3] resized, uint8 mask [H, W] as stored) in order, decoded in threads."""

    def load(i: int) -> tuple[int, Tensor, Tensor]:
        image, mask = images.load(i)
        height, width = fitted_size(image.height, image.width, side)
        small = image.resize((width, height), Image.Resampling.BILINEAR)
        return i, torch.from_numpy(np.array(small)), torch.from_numpy(np.array(mask))

    waiting: deque[Future[tuple[int, Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="lut-ds-evaluate") as workers:
        try:
            for i in indices:
                waiting.append(workers.submit(load, i))
                if len(waiting) > _AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            workers.shutdown(cancel_futures=True)
