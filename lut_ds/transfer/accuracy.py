"""Accuracy of a classifier, exact over ranks: every image counts once, however unevenly the ranks share them.

Of all images, by class, and of the classes with many, medium and few training images, as long-tailed recognition reports it
(Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019): more than 100, 20 to 100, and below 20.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lut_ds.data.loader import EvalLoader
from lut_ds.data.sources import Source
from lut_ds.engine.launch import Ranks
from lut_ds.method.pixels import normalised
from lut_ds.transfer.classifier import eval_crop

MANY, FEW = 100, 20  # training images of a class: above is many, below is few


@torch.no_grad()
def accuracy(
    model: Any, source: Source, image_size: int, ranks: Ranks, batch_size: int, threads: int
) -> dict[str, Any]:
    """Evaluate on all images of a source; a collective.

    Ranks run the same number of batches of the same size, as ZeRO-3 needs: shares are filled up with the first image, which
    does not count again.

    Args:
        model: float [b, 3, S, S] -> logits [b, classes]; left in the mode (train or eval) that it was in.
        batch_size: images a rank and forward pass.

    Returns:
        `top1` and `top5` (per cent; top5 of at most as many classes as there are), `mean_class` (mean over classes of the share
        of their images that is right), `loss` (cross entropy), `images`, and `per_class` (list, per cent; every class has images).
    """
    total, world = len(source), ranks.world_size
    own = list(range(ranks.rank, total, world))
    filled = own + [0] * (-(-total // world) - len(own))
    was_training, dtype = model.training, next(model.parameters()).dtype
    model.eval()
    classes = len(source.classes)
    sums = torch.zeros(
        2 + 2 * classes, dtype=torch.float64, device=ranks.device
    )  # right among five, loss, by class right and all
    left = len(own)
    crop = eval_crop(image_size)
    for pixels, labels in EvalLoader(source, image_size, batch_size, threads, filled, device=ranks.device, crop=crop):
        logits = model(normalised(pixels).to(dtype)).float()[:left]
        labels = labels.to(ranks.device)[: len(logits)]
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        by_class = [torch.bincount(of, minlength=classes).double() for of in (labels[right[:, 0]], labels)]
        sums += torch.cat([torch.stack([right.sum().double(), loss.double()]), *by_class])
        left = max(0, left - len(labels))
    model.train(was_training)
    if world > 1:
        dist.all_reduce(sums)
    among_five, total_loss, right_by_class, images_by_class = sums.cpu().split([1, 1, classes, classes])
    per_class = 100 * right_by_class / images_by_class
    return {
        "top1": (100 * right_by_class.sum() / total).item(),
        "top5": (100 * among_five / total).item(),
        "mean_class": per_class.mean().item(),
        "loss": (total_loss / total).item(),
        "images": total,
        "per_class": per_class.tolist(),
    }


def by_frequency(per_class: Sequence[float], train_images: Sequence[int]) -> dict[str, float | None]:
    """Mean of `per_class` over the classes with `many`, `medium` and `few` training images; None where there is none."""
    groups: dict[str, list[float]] = {"many": [], "medium": [], "few": []}
    for value, count in zip(per_class, train_images, strict=True):
        groups["many" if count > MANY else "few" if count < FEW else "medium"].append(value)
    return {name: sum(values) / len(values) if values else None for name, values in groups.items()}
