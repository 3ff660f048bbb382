"""Singular values of the features: how many directions of the space are used.

Images: centred pooled features of all images. Tokens: patch tokens, each image's own mean taken away, over all images; what
tells patches of one image apart (Park et al., "What Do Self-Supervised Vision Transformers Learn?", 2023, look at both).
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lut_ds.analysis.figures import Theme, axes_grid, new_figure
from lut_ds.analysis.subject import Found, Subject, as_lists, watch_tokens
from lut_ds.data.progress import progress_bar


def centred_spectrum(features: Tensor) -> Tensor:
    """Singular values of [N, D] with the mean row taken away, float64 [min(N, D)], falling."""
    wide = features.double()
    return torch.linalg.svdvals(wide - wide.mean(dim=0))


def effective_rank(values: Tensor) -> float:
    """exp(entropy) of singular values over their sum (Roy & Vetterli 2007): 1 for one direction, n for n alike; 0 for none."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


@torch.no_grad()
def measure(subject: Subject) -> Found:
    """Spectra of the last layer's features, and effective ranks by layer.

    Returns:
        For `image` and `token`: `log_singular_values` (natural log, of values over the largest, falling; the zeros left out),
        `effective_rank`, `rank_bound` (what the numbers of images and of dimensions allow). `effective_rank_by_layer` of the
        mean patch token after the embedding and after each block. `images`, `dimensions`.
    """
    depth, prefix = len(subject.model.blocks), subject.prefix
    pooled: list[list[Tensor]] = [[] for _ in range(depth + 1)]
    features: list[Tensor] = []
    width = subject.model.embed_dim
    scatter, count = torch.zeros(width, width, dtype=torch.float64), 0

    def visit(index: int, tokens: Tensor) -> None:
        pooled[index].append(tokens[:, prefix:].mean(dim=1).cpu())

    with progress_bar(f"spectrum of {subject.name}", len(subject.pixels)) as bar:
        for images in subject.batches():
            with watch_tokens(subject.model, visit):
                tokens = subject.model.forward_features(images)[:, prefix:].double()
            features.append(subject.features(images).cpu())
            tokens = (tokens - tokens.mean(dim=1, keepdim=True)).flatten(0, 1)
            scatter += (tokens.T @ tokens).cpu()
            count += len(tokens) - len(images)
            bar.update(len(images))
    values = {
        "image": (centred_spectrum(torch.cat(features)), len(subject.pixels) - 1),
        "token": (torch.linalg.eigvalsh(scatter).flip(0).clamp_min(0).sqrt(), count),
    }
    numbers = {
        "images": len(subject.pixels),
        "dimensions": width,
        **{level: _describe(spectrum, bound, width) for level, (spectrum, bound) in values.items()},
        "effective_rank_by_layer": [effective_rank(centred_spectrum(torch.cat(parts))) for parts in pooled],
    }
    return Found(numbers, {})


def _describe(values: Tensor, samples: int, width: int) -> dict[str, object]:
    bound = min(samples, width)
    values = values[:bound]
    # Below this a value is the rounding of the largest one.
    kept = values[values > values[:1] * 1e-7] if len(values) else values
    logs = (kept / kept[0]).log() if len(kept) else kept
    return {
        "log_singular_values": as_lists(logs),
        "effective_rank": effective_rank(kept),
        "rank_bound": bound,
    }


def draw(theme: Theme, found: Sequence[tuple[str, Found]]) -> Figure:
    """Both spectra, and the effective rank by layer."""
    figure = new_figure(12, 3.4)
    image, token, layers = axes_grid(figure, 1, 3)
    for axis, level, title in (
        (image, "image", "Images: pooled features"),
        (token, "token", "Patch tokens in an image"),
    ):
        for (name, each), colour in zip(found, (theme.student, theme.teacher)):
            part = each.numbers[level]
            logs = part["log_singular_values"]
            axis.plot(range(1, len(logs) + 1), logs, color=colour, label=f"{name}, rank {part['effective_rank']:.1f}")
        axis.set(title=title, xlabel="index", ylabel="log of singular value / largest")
        axis.legend()
    for (name, each), colour, marker in zip(found, (theme.student, theme.teacher), "oD"):
        ranks = each.numbers["effective_rank_by_layer"]
        layers.plot(range(len(ranks)), ranks, color=colour, marker=marker, markersize=4, label=name)
    layers.set(title="Effective rank by layer", xlabel="layer (0: embedding)", ylabel="effective rank")
    layers.set_ylim(bottom=0)
    layers.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
