"""Where the cls token looks: its attention to the patches in the last layer, by head, and how concentrated it is."""

import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lut_ds.analysis.figures import Theme
from lut_ds.analysis.heat import Row, draw_heat
from lut_ds.analysis.subject import AttentionCall, Found, Subject, as_lists, check_attention, watch_attention
from lut_ds.data.progress import progress_bar

SHOWN = 8  # images in the figure


def attention_to_patches(probabilities: Tensor, prefix: int, cls: bool) -> Tensor:
    """Attention [B, H, N, N] from the cls token to each patch, [B, H, L], normalised to sum to one over the patches.

    A model without a cls token: the mean over the patches that ask.
    """
    rows = probabilities[:, :, 0] if cls else probabilities[:, :, prefix:].mean(dim=2)
    weights = rows[..., prefix:]
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)


@torch.no_grad()
def measure(subject: Subject) -> Found:
    """Maps of the first images, and entropies over all of them.

    Returns:
        `query` (`cls`, or `mean of patches`), `entropy` [layers][heads] of the attention to the patches over log L (1: to
        all alike), `effective_patches` [layers] (exp of the entropy, mean over heads and images), `images`; and for the
        figure the last layer's `maps` [n, H, rows, columns] of the first images, `pixels` [n, S, S, 3].

    Raises:
        UserError: attention of another kind.
    """
    check_attention(subject.model, subject.name)
    depth, patches = len(subject.model.blocks), math.prod(subject.grid)
    cls = subject.model.cls_token is not None  # registers come before the patches too
    entropies: list[list[Tensor]] = [[] for _ in range(depth)]
    maps: list[Tensor] = []

    def visit(index: int, call: AttentionCall) -> None:
        weights = attention_to_patches(call.probabilities(), subject.prefix, cls)
        entropies[index].append(torch.special.entr(weights).sum(-1).double().cpu())
        if index == depth - 1 and sum(map(len, maps)) < SHOWN:
            maps.append(weights.unflatten(2, subject.grid).cpu())

    with (
        progress_bar(f"attention maps of {subject.name}", len(subject.pixels)) as bar,
        watch_attention(subject.model, visit),
    ):
        for images in subject.batches():
            subject.model.forward_features(images)
            bar.update(len(images))
    entropy = torch.stack([torch.cat(parts) for parts in entropies])  # [layers, images, heads]
    numbers = {
        "images": len(subject.pixels),
        "query": "cls" if cls else "mean of patches",
        "patches": patches,
        "entropy": as_lists(entropy.mean(dim=1) / math.log(patches)),
        "effective_patches": as_lists(entropy.exp().mean(dim=(1, 2))),
    }
    shown = torch.cat(maps)[:SHOWN].double().numpy()
    return Found(numbers, {"maps": shown, "pixels": subject.pixels[:SHOWN].cpu().numpy()})


def draw(theme: Theme, found: Sequence[tuple[str, Found]]) -> Figure:
    """The mean over the last layer's heads, and heads from the most concentrated to the least."""
    rows: list[Row] = []
    for name, each in found:
        maps = each.arrays["maps"]
        rows.append((name, "mean of heads", maps.mean(axis=1)))
        order = torch.tensor(each.numbers["entropy"][-1]).argsort()
        count = min(5 if len(found) == 1 else 3, len(order))
        chosen = order[torch.linspace(0, len(order) - 1, count).round().long()].tolist()
        rows += [(name, f"head {head + 1}", maps[:, head]) for head in chosen]
    return draw_heat(theme, found[0][1].arrays["pixels"], rows)
