"""Counting right answers: one pass over a set of images, altered in one or several ways; exact over uneven ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lut_ds.data.loader import EvalLoader
from lut_ds.errors import RunFault
from lut_ds.transfer.features import Compute
from lut_ds.transfer.robustness.classifier import Classifier
from lut_ds.transfer.robustness.patches import Batch
from lut_ds.transfer.robustness.sets import ImageSet

Alter = Callable[[Batch, Sequence[int], Sequence[float]], Iterator[Batch]]
"""Images, their numbers in the source, and values (severities, ratios, grids) -> the images altered by each of the values."""


@dataclass(frozen=True)
class Pass:
    """A look at every image of a set.

    Attributes:
        name: of what is done, such as `c/fog`.
        images: the set.
        values: of what is done; each is a condition of its own.
        alter: does it.
    """

    name: str
    images: ImageSet
    values: tuple[float, ...]
    alter: Alter

    def condition(self, value: float) -> str:
        """The name of one condition, such as `c/fog/3`; of a set as it is, the set's."""
        return f"{self.name}/{value:g}" if value else self.name


def unaltered(pixels: Batch, samples: Sequence[int], values: Sequence[float]) -> Iterator[Batch]:
    """For sets that are taken as they are; their only value is 0."""
    yield pixels


@torch.inference_mode()
def measure(
    classifier: Classifier,
    todo: Pass,
    values: Sequence[float],
    limit: int | None,
    compute: Compute,
    advance: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """Classify the images of a pass under some of its values; a collective.

    Args:
        values: of `todo.values`.
        limit: classify so many images at most, spread evenly.
        advance: told how many images were classified here.

    Returns:
        `top1`, `top5` (per cent; top5 None with five classes or fewer) and `images` for each value; the same on all ranks.

    Raises:
        RunFault: an image that cannot be decoded, or logits that are not finite.
    """
    every = todo.images.indices(limit)
    own = every[compute.ranks.rank :: compute.ranks.world_size]
    right = torch.zeros(len(values), 2, dtype=torch.int64)
    groups = torch.from_numpy(todo.images.groups).to(compute.ranks.device)
    first = 0
    for pixels, _ in _batches(classifier, todo.images, own, compute):
        samples = own[first : first + len(pixels)]
        targets = torch.from_numpy(todo.images.targets[samples]).to(compute.ranks.device)
        for row, altered in enumerate(todo.alter(pixels.numpy(), samples.tolist(), values)):
            scores = _scores(classifier, altered, groups, compute)
            hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == targets[:, None]
            right[row] += torch.stack([hits[:, 0].sum(), hits.sum()]).cpu()
            advance(len(pixels))
        first += len(pixels)
    if compute.ranks.world_size > 1:
        right = right.to(compute.ranks.device)
        dist.all_reduce(right)
    shares = (100.0 * right.double() / len(every)).tolist()
    many = len(todo.images.groups) > 5
    return [{"top1": top1, "top5": top5 if many else None, "images": len(every)} for top1, top5 in shares]


def _batches(
    classifier: Classifier, images: ImageSet, own: NDArray[np.int64], compute: Compute
) -> Iterator[tuple[Tensor, Tensor]]:
    if not len(own):  # more ranks than images
        return
    crop = classifier.crop if images.crop is None else images.crop
    size, threads = classifier.found.image_size, compute.threads
    yield from EvalLoader(images.source, size, compute.batch_size, threads, own, device=torch.device("cpu"), crop=crop)


def _scores(classifier: Classifier, pixels: Batch, groups: Tensor, compute: Compute) -> Tensor:
    """Float [b, G]."""
    images = classifier.found.normalised(torch.from_numpy(np.ascontiguousarray(pixels)).to(compute.ranks.device))
    logits = classifier.logits(images)
    if not torch.isfinite(logits).all():
        raise RunFault("robustness: NaN or infinity in the logits; compute in fp32, or take another checkpoint")
    return logits[:, groups].amax(dim=2)
