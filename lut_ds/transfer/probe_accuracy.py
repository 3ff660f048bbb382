"""What every classification result has in common: accuracies, a head that timm loads, and the files written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lut_ds.analysis.figures import write_aside


def accuracies(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Per cent right: `top1`, `top5` (None with five classes or fewer) and `per_class` by name, in the classes' order.

    Args:
        logits: float [N, C].
        labels: int64 [N]; every class occurs.
    """
    right = logits.argmax(dim=1) == labels
    top5 = None
    if len(classes) > 5:
        top5 = 100.0 * (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()
    return {"top1": 100.0 * right.double().mean().item(), "top5": top5, "per_class": per_class(right, labels, classes)}


def per_class(right: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Per cent right by class: bool and int64 [N]."""
    count = torch.bincount(labels, minlength=len(classes)).double()
    hits = torch.bincount(labels[right], minlength=len(classes)).double()
    return dict(zip(classes, (100.0 * hits / count).tolist(), strict=True))


def folded(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """A linear layer [C, D] over (x - mean) / std as one over x, named as timm's head."""
    scaled = weight.double() / std.double()
    return {"head.weight": scaled.float(), "head.bias": (bias.double() - scaled @ mean.double()).float()}


def write_head(path: Path, head: Mapping[str, Tensor], classes: Sequence[str]) -> Path:
    """Write a head for `model.reset_classifier(C)` and `model.load_state_dict(..., strict=False)`, class names in its header."""
    tensors = {name: value.contiguous() for name, value in head.items()}
    return write_aside(path, save(tensors, {"format": "pt", "classes": json.dumps(list(classes))}))


def write_results(path: Path, results: Mapping[str, Any]) -> Path:
    """Write results.json whole or not at all."""
    return write_aside(path, (json.dumps(results, indent=1) + "\n").encode())
