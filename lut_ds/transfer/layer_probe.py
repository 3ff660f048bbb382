"""What each layer knows of the classes: the quick linear probe on the mean patch token after every block."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lut_ds.analysis.subject import watch_tokens
from lut_ds.data.loader import EvalLoader
from lut_ds.data.progress import progress_bar
from lut_ds.data.sources import Source
from lut_ds.transfer.features import Compute
from lut_ds.transfer.models import Pretrained
from lut_ds.transfer.probe import Sweep, probe_features

SWEEP = Sweep(weight_decays=(0.0,), epochs=30)


@torch.no_grad()
def layer_features(
    found: Pretrained, source: Source, samples: NDArray[np.int64], what: str, compute: Compute
) -> tuple[Tensor, Tensor]:
    """The mean patch token after the embedding and after each block: fp32 [1 + depth, N, D]; and int64 labels [N]."""
    model = found.model
    layers: list[list[Tensor]] = [[] for _ in range(1 + len(model.blocks))]
    labels = []
    device = compute.ranks.device

    def visit(index: int, tokens: Tensor) -> None:
        layers[index].append(tokens[:, model.num_prefix_tokens :].mean(dim=1).float().cpu())

    loader = EvalLoader(source, found.image_size, compute.batch_size, compute.threads, samples, device=device)
    with progress_bar(f"layers, {what}", len(samples)) as bar, watch_tokens(model, visit):
        for pixels, classes in loader:
            with compute.autocast():
                model.forward_features(found.normalised(pixels))
            labels.append(classes)
            bar.update(len(pixels))
    return torch.stack([torch.cat(parts) for parts in layers]), torch.cat(labels)


def probe_layers(
    found: Pretrained, train: Source, val: Source, chosen: Sequence[NDArray[np.int64]], compute: Compute
) -> dict[str, Any]:
    """Accuracy of a linear classifier on each layer.

    Args:
        found: the model, on the device of `compute`.
        chosen: samples of `train` and of `val` that are used.

    Returns:
        `top1` (per cent, of the embedding and after each block), `best_layer`, `images`.
    """
    known, asked = (
        layer_features(found, source, samples, what, compute)
        for source, samples, what in zip((train, val), chosen, ("train", "val"), strict=True)
    )
    top1 = []
    for layer in range(len(known[0])):
        pairs = ((known[0][layer], known[1]), (asked[0][layer], asked[1]))
        top1.append(probe_features(*pairs, train.classes, SWEEP, compute.ranks)[0]["top1"])
    images = {"train": len(known[1]), "val": len(asked[1])}
    return {"top1": top1, "best_layer": int(np.argmax(top1)), "images": images, "classes": len(train.classes)}
