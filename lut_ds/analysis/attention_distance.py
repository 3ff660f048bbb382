"""How far attention reaches, by layer and head (Dosovitskiy et al. 2021, appendix D.7; Raghu et al. 2021, section 4)."""

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lut_ds.analysis.figures import Theme, axes_grid, new_figure
from lut_ds.analysis.subject import AttentionCall, Found, Subject, as_lists, check_attention, watch_attention
from lut_ds.data.progress import progress_bar


def patch_distances(grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Pixels between the centres of patches, float32 [L, L], for a grid of rows and columns of patches of such sides."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centres = torch.stack([rows.flatten() * patch[0], columns.flatten() * patch[1]], dim=1).float()
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(probabilities: Tensor, distances: Tensor, prefix: int) -> Tensor:
    """Mean distance in pixels from a patch to what it attends to: [B, H, N, N] -> [B, H].

    Tokens before the patches have no place in the image: each patch's weights are taken over the patches alone and
    normalised to sum to one, so the value does not shrink where much attention goes to the cls token.

    Args:
        probabilities: rows are queries; N = prefix + L.
        distances: [L, L], see `patch_distances`.
        prefix: tokens before the patches.
    """
    weights = probabilities[..., prefix:, prefix:]
    return ((weights * distances).sum(-1) / weights.sum(-1).clamp_min(1e-30)).mean(-1)


def attention_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of the rows over the largest possible, log N: [..., N, N] -> [...], 0 for one token, 1 for all alike."""
    return torch.special.entr(probabilities).sum(-1).mean(-1) / math.log(probabilities.shape[-1])


@torch.no_grad()
def measure(subject: Subject) -> Found:
    """Means over the images, by layer and head.

    Returns:
        `distance` in pixels of the model's input, `entropy` over log N, `prefix_share` (of the patches' attention that goes
        to cls and registers): lists [layers][heads]; `by_layer` (mean distance over heads), `uniform` (distance of attention
        to all patches alike), `images`.

    Raises:
        UserError: attention of another kind.
    """
    check_attention(subject.model, subject.name)
    height, width = (
        size // cells for size, cells in zip(subject.model.patch_embed.img_size, subject.grid, strict=True)
    )
    distances = patch_distances(subject.grid, (height, width)).to(next(subject.model.parameters()).device)
    shape = (3, len(subject.model.blocks), subject.model.blocks[0].attn.num_heads)
    sums = torch.zeros(shape, dtype=torch.float64)

    def visit(index: int, call: AttentionCall) -> None:
        p = call.probabilities()
        share = p[:, :, subject.prefix :, : subject.prefix].sum(-1).mean(-1)
        values = (attention_distance(p, distances, subject.prefix), attention_entropy(p), share)
        sums[:, index] += torch.stack(values).double().sum(dim=1).cpu()

    with (
        progress_bar(f"attention of {subject.name}", len(subject.pixels)) as bar,
        watch_attention(subject.model, visit),
    ):
        for images in subject.batches():
            subject.model.forward_features(images)
            bar.update(len(images))
    distance, entropy, share = sums / len(subject.pixels)
    numbers = {
        "images": len(subject.pixels),
        "unit": "pixels",
        "image_side": subject.pixels.shape[1],
        "uniform": float(distances.mean()),
        "distance": as_lists(distance),
        "by_layer": as_lists(distance.mean(dim=1)),
        "entropy": as_lists(entropy),
        "prefix_share": as_lists(share),
    }
    return Found(numbers, {})


def draw(theme: Theme, found: Sequence[tuple[str, Found]]) -> Figure:
    """Distance and entropy over layers: a dot a head, a line for their mean."""
    figure = new_figure(9, 3.4)
    left, right = axes_grid(figure, 1, 2)
    _dots(left, theme, found, "distance")
    for (_, each), colour in zip(found, (theme.student, theme.teacher)):
        left.axhline(each.numbers["uniform"], color=colour, linestyle=(0, (5, 4)), linewidth=1)
    left.set(title="Attention distance", xlabel="layer", ylabel="pixels")
    heads = [value for _, each in found for layer in each.numbers["distance"] for value in layer]
    left.set_ylim(0, 1.08 * max(*heads, *(each.numbers["uniform"] for _, each in found)))
    _dots(right, theme, found, "entropy")
    right.set(title="Attention entropy", xlabel="layer", ylabel="share of log N", ylim=(0, 1.02))
    left.legend(loc="lower right")
    return figure


def _dots(axes: Axes, theme: Theme, found: Sequence[tuple[str, Found]], key: str) -> None:
    for k, ((name, each), colour, marker) in enumerate(zip(found, (theme.student, theme.teacher), "oD")):
        layers = torch.tensor(each.numbers[key], dtype=torch.float64)
        place = torch.arange(1, len(layers) + 1) + (k - 0.5 * (len(found) - 1)) * 0.16
        for x, heads in zip(place.tolist(), layers.tolist(), strict=True):
            axes.plot([x] * len(heads), heads, marker, color=colour, markersize=4, alpha=0.55, linestyle="none")
        axes.plot(place.tolist(), layers.mean(dim=1).tolist(), color=colour, label=name)
    depth = max(len(each.numbers[key]) for _, each in found)
    axes.set_xticks(range(1, depth + 1, max(1, depth // 12)))
