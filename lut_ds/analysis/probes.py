"""Pictures of evaluations on frozen features: accuracy by k, by learning rate, by epoch, and by class."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lut_ds.analysis.figures import Theme, axes_grid, new_figure
from lut_ds.analysis.subject import Found

_MOST_NAMES = 24  # classes named under their bars


def draw_knn_by_k(theme: Theme, results: Mapping[str, Any]) -> Figure:
    """Top-1 by k, and by class for the best k, from what `lut-ds knn` found."""
    figure = new_figure(9, 3.2)
    left, right = axes_grid(figure, 1, 2)
    ks = sorted(map(int, results["top1"]))
    left.plot(ks, [results["top1"][str(k)] for k in ks], marker="o", color=theme.teacher)
    left.set(title="k-NN", xlabel="neighbours k", ylabel="top-1, %")
    _classes(right, theme, results["per_class"], f"by class, k = {results['best_k']}")
    return figure


def draw_sweep(theme: Theme, results: Mapping[str, Any]) -> Figure:
    """Accuracy on held-out training images by learning rate, and on the validation images by class."""
    figure = new_figure(9, 3.2)
    left, right = axes_grid(figure, 1, 2)
    decays = sorted({row["weight_decay"] for row in results["held_out"]})
    for decay, marker in zip(decays, "os^vDP*X" * len(decays), strict=False):
        rows = sorted((r["lr"], r["top1"]) for r in results["held_out"] if r["weight_decay"] == decay)
        left.plot(*zip(*rows, strict=True), marker=marker, label=f"weight decay {decay:g}")
    left.axvline(results["chosen"]["lr"], color=theme.faint, linestyle=":", linewidth=1)
    left.set(title="heads, on images held out of train", xlabel="learning rate", ylabel="top-1, %", xscale="log")
    left.legend()
    _classes(right, theme, results["per_class"], f"validation, {results['top1']:.1f} %")
    return figure


def draw_history(theme: Theme, results: Mapping[str, Any]) -> Figure:
    """Validation accuracy and training loss by epoch, and accuracy by class at the end."""
    figure = new_figure(12, 3.2)
    accuracy, loss, classes = axes_grid(figure, 1, 3)
    epochs = [row["epoch"] for row in results["history"]]
    accuracy.plot(epochs, [row["top1"] for row in results["history"]], color=theme.teacher)
    accuracy.set(title="validation", xlabel="epoch", ylabel="top-1, %")
    loss.plot(epochs, [row["loss"] for row in results["history"]], color=theme.student)
    loss.set(title="training loss", xlabel="epoch", ylabel="cross entropy")
    _classes(classes, theme, results["per_class"], f"at the end, {results['top1']:.1f} %")
    return figure


def draw_layers(theme: Theme, found: Sequence[tuple[str, Found]]) -> Figure:
    """Linear-probe accuracy after the embedding and after each block."""
    figure = new_figure(6.5, 3.4)
    (axes,) = axes_grid(figure, 1, 1)
    for (name, each), colour, marker in zip(found, (theme.student, theme.teacher), "oD"):
        top1 = each.numbers["top1"]
        best = each.numbers["best_layer"]
        label = f"{name}, best {top1[best]:.1f} % at layer {best}"
        axes.plot(range(len(top1)), top1, color=colour, marker=marker, markersize=4, label=label)
    axes.set(title="Linear probe by layer", xlabel="layer (0: embedding)", ylabel="top-1, %")
    axes.set_ylim(top=101.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right")
    return figure


def _classes(axes: Axes, theme: Theme, per_class: Mapping[str, float], title: str) -> None:
    """Bars by class, lowest first; named where there is room."""
    rows = sorted(per_class.items(), key=lambda row: row[1])
    axes.bar(range(len(rows)), [value for _, value in rows], color=theme.student)
    names = [name[:12] for name, _ in rows] if len(rows) <= _MOST_NAMES else []
    axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names), default=0) < 4 else 90)
    axes.set(title=title, ylabel="top-1, %", ylim=(0, 100))
