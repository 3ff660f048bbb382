"""Which patches a feature comes from: attention weighted by its gradient, for a model without a classifier.

What is explained, in place of a class score: how far an image's feature lies towards its class, the projection of the feature
on the mean feature of the other images of its class, both about the mean of all images. Where images have no labels, or
a class has one image alone, it is the length of the feature about the mean of all: what tells this image from the average one.

Chefer et al., "Generic Attention-model Explainability", 2021: R = R + mean over heads of max(A * dA, 0) @ R from layer to layer,
R at the start the identity; then the rows that are pooled, without the identity itself. Grad-CAM on the tokens of the last block was
tried beside it and left out: removing the patches that it calls relevant cost the target less than removing random ones.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from lut_ds.analysis.figures import Theme
from lut_ds.analysis.heat import draw_heat
from lut_ds.analysis.subject import (
    AttentionCall,
    Found,
    Subject,
    all_features,
    check_attention,
    watch_attention,
)
from lut_ds.data.progress import progress_bar

SHOWN, TESTED = 8, 64  # images in the figure, and in the test of leaving patches out
LEFT_OUT = 0.25  # of the patches, in that test

Target = Callable[[Tensor], Tensor]
"""Features [b, D] of the same images -> what is explained [b]."""


def class_target(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Means of all features [D] and, for each image, of the other images of its class [N, D]; None where a class has one image."""
    mean = features.mean(dim=0)
    onehot = F.one_hot(labels).to(features.dtype)
    count = onehot.sum(dim=0)
    if bool((count[labels] < 2).any()):
        return None
    sums = onehot.T @ features
    return mean, (sums[labels] - features) / (count[labels] - 1)[:, None]


def relevance(subject: Subject, images: Tensor, target: Target, pools_patches: bool) -> Tensor:
    """Relevance of each patch: images [b, 3, S, S] -> float [b, L], not negative.

    Args:
        pools_patches: True where the feature is the mean of the patch tokens, False where it is the cls token.
    """
    calls: list[AttentionCall] = []
    images = images.detach().requires_grad_(True)  # so that a graph is built whatever the parameters ask for
    with torch.enable_grad(), watch_attention(subject.model, lambda _, call: calls.append(call)):
        value = target(subject.features(images)).sum()
    grads = torch.autograd.grad(value, [call.output for call in calls])
    prefix = subject.prefix
    with torch.no_grad():
        identity = torch.eye(calls[0].output.shape[1], device=images.device)
        flow = identity.expand(len(images), -1, -1)
        for call, grad in zip(calls, grads, strict=True):
            flow = flow + (call.probabilities() * call.gradient(grad)).clamp_min(0).mean(dim=1) @ flow
        rows = flow - identity
        pooled = rows[:, prefix:].mean(dim=1) if pools_patches else rows[:, 0]
    return pooled[:, prefix:].detach()


def measure(subject: Subject, pools_patches: bool) -> Found:
    """Maps of the first images, and a test of them: the feature is computed again without some of the patches' tokens.

    Returns:
        `target` (`class`: projection on the class mean; `norm`: length about the mean), `target_value` (mean), `images`,
        `left_out_share`, and `target_left`: the mean over images of the target over that of the whole image when the `most`
        relevant share of the patches, the `least` relevant, or as many `random` ones are left out. A map that tells
        something has most < random < least. For the figure `maps` [n, rows, columns] and `pixels`.

    Raises:
        UserError: attention of another kind.
    """
    check_attention(subject.model, subject.name)
    features = all_features(subject)
    means = None if subject.labels is None else class_target(features, subject.labels)
    count = min(TESTED, len(features))
    generator = torch.Generator().manual_seed(0)
    maps: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {name: [] for name in ("whole", "most", "least", "random")}
    with progress_bar(f"relevance for {subject.name}", count) as bar:
        for start, batch in zip(range(0, count, subject.batch_size), subject.batches()):
            images = batch[: count - start]
            target = _target(features, means, torch.arange(start, start + len(images)), images.device)
            found = relevance(subject, images, target, pools_patches)
            for name, value in _without(subject, images, found, target, generator).items():
                scores[name].append(value)
            maps.append(found.unflatten(1, subject.grid).cpu())
            bar.update(len(images))
    mean = {name: float(torch.cat(parts).double().mean()) for name, parts in scores.items()}
    whole = mean.pop("whole")
    numbers = {
        "target": "norm" if means is None else "class",
        "target_value": whole,
        "images": count,
        "left_out_share": LEFT_OUT,
        "target_left": {name: value / whole if whole else None for name, value in mean.items()},
    }
    shown = torch.cat(maps)[:SHOWN].double().numpy()
    return Found(numbers, {"maps": shown, "pixels": subject.pixels[:SHOWN].cpu().numpy()})


def _target(features: Tensor, means: tuple[Tensor, Tensor] | None, ids: Tensor, device: torch.device) -> Target:
    middle = features.mean(dim=0)
    towards = features[ids] - middle if means is None else means[1][ids] - means[0]
    direction, middle = F.normalize(towards, dim=1).to(device), middle.to(device)
    return lambda values: ((values - middle) * direction).sum(dim=1)


@torch.no_grad()
def _without(
    subject: Subject, images: Tensor, found: Tensor, target: Target, generator: torch.Generator
) -> dict[str, Tensor]:
    """What is explained, for whole images and without some patches: [b] by name."""
    out = max(1, round(LEFT_OUT * found.shape[1]))
    order = found.argsort(dim=1, descending=True)
    random = torch.rand(found.shape, generator=generator).to(images.device).argsort(dim=1)
    scores = {"whole": target(subject.features(images)).cpu()}
    for name, first in {"most": order, "least": order.flip(1), "random": random}.items():
        with _only(subject, first[:, out:].sort(dim=1).values):
            scores[name] = target(subject.features(images)).cpu()
    return scores


@contextmanager
def _only(subject: Subject, patches: Tensor) -> Iterator[None]:
    """Inside, the model reads the tokens of these patches alone: raster indices int64 [b, K]."""
    prefix = subject.prefix

    def drop(module: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        index = (prefix + patches)[..., None].expand(-1, -1, tokens.shape[2])
        return torch.cat([tokens[:, :prefix], tokens.gather(1, index)], dim=1)

    handle = subject.model.patch_drop.register_forward_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def draw(theme: Theme, found: Sequence[tuple[str, Found]]) -> Figure:
    """A row a model."""
    rows = [(name, "relevance", each.arrays["maps"]) for name, each in found]
    return draw_heat(theme, found[0][1].arrays["pixels"], rows)
