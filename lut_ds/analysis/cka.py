"""Similarity of layers: linear CKA (Kornblith et al. 2019) from minibatches with the unbiased HSIC (Nguyen et al. 2021)."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lut_ds.analysis.figures import Theme, axes_grid, new_figure
from lut_ds.analysis.subject import Found, Subject, as_lists, watch_tokens
from lut_ds.data.progress import progress_bar
from lut_ds.errors import UserError

FEWEST = 4  # images of a minibatch for which the estimator is defined


def gram(features: Tensor) -> Tensor:
    """Inner products of the rows of [n, D] about their mean, float64 [n, n], with a diagonal of zeros.

    The estimator does not depend on the mean; taking it away first keeps digits.
    """
    centred = features.float() - features.float().mean(dim=0)
    return (centred @ centred.T).double().fill_diagonal_(0.0)


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """HSIC_1 of Song et al. 2012 for every pair: grams [P, n, n] and [Q, n, n] without diagonals -> [P, Q]. n >= 4."""
    n = first.shape[-1]
    trace = torch.einsum("pij,qij->pq", first, second)
    rows = first.sum(-1) @ second.sum(-1).T
    total = first.sum((-2, -1))[:, None] * second.sum((-2, -1))[None]
    return (trace + total / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


class MinibatchCKA:
    """Linear CKA between two lists of representations, summed up over minibatches."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, first: Tensor, second: Tensor) -> None:
        """Grams [P, n, n] and [Q, n, n] of the same n images, see `gram`; a batch counts by its images."""
        parts = [
            len(first[0]) * unbiased_hsic(first, second),
            len(first[0]) * torch.stack([unbiased_hsic(g[None], g[None])[0, 0] for g in first]),
            len(first[0]) * torch.stack([unbiased_hsic(g[None], g[None])[0, 0] for g in second]),
        ]
        self._sums = [a + b for a, b in zip(self._sums, parts, strict=True)] if self._sums else parts

    def value(self) -> Tensor:
        """CKA float64 [P, Q]; NaN where a representation does not vary."""
        cross, own_first, own_second = self._sums
        return cross / (own_first.clamp_min(0).sqrt()[:, None] * own_second.clamp_min(0).sqrt()[None])


def check_images(images: int, batch_size: int) -> None:
    """UserError unless there are minibatches that the estimator is defined for."""
    for option, found in (("--images", images), ("--batch-size", batch_size)):
        if found < FEWEST:
            raise UserError(f"{option}: cka needs at least {FEWEST} images, found {found}; take more, or leave cka out")


@torch.no_grad()
def measure(subjects: Sequence[Subject]) -> dict[str, Found]:
    """CKA between all layers of each subject, and between those of the first and the second.

    A layer is the embedding (0) or a block's output; its representation of an image is all tokens, one after another.

    Returns:
        By name, and `between` for two: `cka` [layers][layers] (None where a layer does not vary), `images`.

    Raises:
        UserError: fewer than 4 images, or a batch of fewer.
    """
    images = len(subjects[0].pixels)
    check_images(images, subjects[0].batch_size)
    own = [MinibatchCKA() for _ in subjects]
    between = MinibatchCKA()
    used = 0
    names = " and ".join(subject.name for subject in subjects)
    with progress_bar(f"cka of {names}", images) as bar:
        for batches in zip(*(subject.batches() for subject in subjects), strict=True):
            grams = [_grams(subject, batch) for subject, batch in zip(subjects, batches, strict=True)]
            if len(batches[0]) >= FEWEST:
                used += len(batches[0])
                for sums, each in zip(own, grams, strict=True):
                    sums.add(each, each)
                if len(subjects) == 2:
                    between.add(*grams)
            bar.update(len(batches[0]))
    found = {subject.name: _found(sums, used) for subject, sums in zip(subjects, own, strict=True)}
    return {**found, "between": _found(between, used)} if len(subjects) == 2 else found


def _grams(subject: Subject, images: Tensor) -> Tensor:
    layers: list[Tensor] = []
    with watch_tokens(subject.model, lambda index, tokens: layers.append(gram(tokens.flatten(1)).cpu())):
        subject.model.forward_features(images)
    return torch.stack(layers)


def _found(sums: MinibatchCKA, images: int) -> Found:
    value = sums.value()
    lists = [[v if v == v else None for v in row] for row in as_lists(value)]
    return Found({"images": images, "cka": lists}, {"cka": value.numpy()})


def draw(theme: Theme, found: Sequence[tuple[str, Found]]) -> Figure:
    """A square for each subject, and one for both: rows are layers of the first, columns of the second."""
    figure = new_figure(4.1 * len(found), 3.7)
    names = [name for name, _ in found if name != "between"]
    for axis, (name, each) in zip(axes_grid(figure, 1, len(found)), found, strict=True):
        across = name == "between"
        shown = axis.imshow(each.arrays["cka"], vmin=0, vmax=1, cmap="magma", origin="lower", interpolation="nearest")
        axis.grid(False)
        rows, columns = names if across else (name, name)
        axis.set(title="Between the two" if across else name, ylabel=f"layer of {rows}", xlabel=f"layer of {columns}")
        figure.colorbar(shown, ax=axis, shrink=0.85, label="linear CKA")
    return figure
