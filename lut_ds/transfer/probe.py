"""The quick linear probe: many learning rates and weight decays trained at once over features that stay in memory.

As DINOv2's evaluation (Oquab et al. 2023), but the head is chosen on images held out of the training set: the validation
set is looked at once, by the chosen one. Features are standardised by the training set's mean and deviation.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lut_ds.data.progress import progress_bar
from lut_ds.engine.launch import Ranks
from lut_ds.transfer.probe_accuracy import accuracies, folded

MOMENTUM = 0.9


@dataclass(frozen=True)
class Sweep:
    """What is tried: a head for each learning rate (at batch 256) and weight decay, by SGD with a cosine to 0.

    `held_out` of the training images, drawn from each class by `seed`, choose the head.
    """

    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    weight_decays: tuple[float, ...] = (0.0, 1e-4, 1e-3)
    epochs: int = 50
    batch: int = 256
    held_out: float = 0.1
    seed: int = 0

    def heads(self) -> list[tuple[float, float]]:
        """(lr, weight decay) of each head."""
        return [(lr, wd) for wd in self.weight_decays for lr in self.lrs]


def probe_features(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: Sequence[str], sweep: Sweep, ranks: Ranks
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Choose a head, train it on all training features, and evaluate it.

    Args:
        train, val: features fp32 [N, D] and int64 labels [N], equal on every rank; every class occurs.
        ranks: heads are divided over them.

    Returns:
        `top1`, `top5`, `per_class` on `val`; `chosen` (lr, weight decay), `held_out` (per cent right of each head on the
        held-out images), `sweep`; and the head as timm's (see `accuracy.folded`). The same on every rank.
    """
    device = ranks.device
    features, labels = (t.to(device) for t in train)
    mean, std = _statistics(features)
    features = (features - mean) / std
    kept, aside = split(labels.cpu(), sweep.held_out, sweep.seed)
    found: dict[int, float] = {}
    mine = list(range(ranks.rank, len(sweep.heads()), ranks.world_size))
    if mine:
        weight, bias = train_heads(features[kept], labels[kept], len(classes), [sweep.heads()[i] for i in mine], sweep)
        for i, w, b in zip(mine, weight, bias, strict=True):
            right = (features[aside] @ w.T + b).argmax(dim=1) == labels[aside]
            found[i] = 100.0 * right.double().mean().item()
    if ranks.world_size > 1:
        gathered: list[dict[int, float]] = [{}] * ranks.world_size
        dist.all_gather_object(gathered, found)
        found = {i: value for part in gathered for i, value in part.items()}
    best = max(sorted(found), key=lambda i: found[i])
    weight, bias = train_heads(features, labels, len(classes), [sweep.heads()[best]], sweep)
    if ranks.world_size > 1:
        for tensor in (weight, bias):  # the ranks' products may differ in the last bit
            dist.broadcast(tensor, src=0)
    head = {name: t.cpu() for name, t in folded(weight[0].cpu(), bias[0].cpu(), mean.cpu(), std.cpu()).items()}
    logits = val[0] @ head["head.weight"].T + head["head.bias"]
    lr, wd = sweep.heads()[best]
    table = [{"lr": r, "weight_decay": w, "top1": found[i]} for i, (r, w) in enumerate(sweep.heads())]
    about = {"chosen": {"lr": lr, "weight_decay": wd}, "held_out": table, "sweep": asdict(sweep)}
    return {**accuracies(logits, val[1], classes), **about}, head


def split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices kept and held out: `share` of each class (rounded, but never all of it), drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # by class, at random inside it
    count = torch.bincount(labels)
    place = torch.arange(len(labels)) - (count.cumsum(0) - count)[labels[order]]
    size = count[labels[order]]
    out = place < torch.minimum((size * share).round(), size - 1)
    if not out.any():  # classes of an image or two: choose by what was trained on
        return order.sort().values, order.sort().values
    return order[~out].sort().values, order[out].sort().values


def train_heads(
    features: Tensor, labels: Tensor, classes: int, heads: Sequence[tuple[float, float]], sweep: Sweep
) -> tuple[Tensor, Tensor]:
    """Train linear heads side by side in one pass over the features an epoch; they see the same batches.

    Args:
        features: fp32 [N, D], standardised.
        labels: int64 [N].
        heads: (lr, weight decay) of each of H; biases are not decayed.

    Returns:
        Weights [H, C, D] and biases [H, C], fp32.
    """
    n, width = features.shape
    batch = min(sweep.batch, n)
    lr = torch.tensor([lr * batch / 256 for lr, _ in heads], device=features.device)[:, None, None]
    decay = torch.tensor([wd for _, wd in heads], device=features.device)[:, None, None]
    weight = torch.zeros(len(heads), classes, width, device=features.device)
    bias = torch.zeros(len(heads), classes, 1, device=features.device)
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    generator = torch.Generator().manual_seed(sweep.seed)
    steps = sweep.epochs * (n // batch)
    with progress_bar(f"probe of {len(heads)} heads", steps, unit="step") as bar:
        for step in range(steps):
            if step % (n // batch) == 0:
                order = torch.randperm(n, generator=generator).to(features.device)
            rows = order[(step % (n // batch)) * batch :][:batch]
            x, y = features[rows], labels[rows]
            error = F.softmax(torch.matmul(weight, x.T) + bias, dim=1)  # [H, C, b]
            error[:, y, torch.arange(batch, device=y.device)] -= 1
            error /= batch
            scale = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            gradients = (error @ x + decay * weight, error.sum(dim=2, keepdim=True))
            for parameter, momentum, gradient in zip((weight, bias), momenta, gradients, strict=True):
                momentum.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(scale * momentum)
            bar.update(1)
    return weight, bias.squeeze(2)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [D] over images; a feature that never changes keeps its scale."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    return mean, torch.where(std > 1e-6, std, torch.ones_like(std))
