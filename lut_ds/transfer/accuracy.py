"""Top-1 and top-5 of a classifier, exact over ranks: every image counts once, however unevenly the ranks share them."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lut_ds.data.loader import EvalLoader
from lut_ds.data.sources import Source
from lut_ds.engine.launch import Ranks
from lut_ds.method.pixels import normalised


@torch.no_grad()
def accuracy(
    model: Any, source: Source, image_size: int, ranks: Ranks, batch_size: int, threads: int
) -> dict[str, float | int]:
    """Evaluate on all images of a source; a collective.

    Ranks run the same number of batches of the same size, as ZeRO-3 needs: shares are filled up with the first image, which
    does not count again.

    Args:
        model: float [b, 3, S, S] -> logits [b, classes]; left in the mode (train or eval) that it was in.
        batch_size: images a rank and forward pass.

    Returns:
        `top1` and `top5` (per cent; top5 of at most as many classes as there are), `loss` (cross entropy), `images`.
    """
    total, world = len(source), ranks.world_size
    own = list(range(ranks.rank, total, world))
    filled = own + [0] * (-(-total // world) - len(own))
    was_training, dtype = model.training, next(model.parameters()).dtype
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # right, right among five, loss
    left = len(own)
    for pixels, labels in EvalLoader(source, image_size, batch_size, threads, filled, device=ranks.device):
        logits = model(normalised(pixels).to(dtype)).float()[:left]
        labels = labels.to(ranks.device)[: len(logits)]
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([right[:, 0].sum().double(), right.sum().double(), loss.double()])
        left = max(0, left - len(labels))
    model.train(was_training)
    if world > 1:
        dist.all_reduce(sums)
    top1, top5, total_loss = (sums / total).tolist()
    return {"top1": 100 * top1, "top5": 100 * top5, "loss": total_loss, "images": total}
