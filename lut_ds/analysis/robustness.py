"""The picture of a robustness evaluation: other sets, corruptions by severity, hidden and shuffled patches."""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lut_ds.analysis.figures import Theme, new_figure

Panel = Callable[[Axes, Theme, Mapping[str, Any]], None]


def draw_robustness(theme: Theme, results: Mapping[str, Any]) -> Figure:
    """What `lut-ds robustness` found, a panel for each kind of test: corruptions on the left, the others beside them."""
    panels: dict[str, Panel] = {"sets": _sets} if results["sets"] else {}
    panels |= {name: panel for name, panel in _PANELS.items() if name in results}
    others = [name for name in panels if name != "corruptions"]
    if "corruptions" in panels:
        rows = [["corruptions", other] for other in others] or [["corruptions"]]
    else:
        rows = [[*others[i : i + 2], "."][:2] for i in range(0, len(others), 2)] if len(others) > 1 else [others]
    corrupted = len(results["corruptions"]["top1"]) if "corruptions" in panels else 0
    figure = new_figure(4.5 * len(rows[0]), max(2.7 * len(rows), 0.24 * corrupted + 1.2))
    found: dict[str, Axes] = figure.subplot_mosaic(rows)
    for name, axes in found.items():
        panels[name](axes, theme, results)
    return figure


def _sets(axes: Axes, theme: Theme, results: Mapping[str, Any]) -> None:
    names = list(results["sets"])
    values = [results["sets"][name]["top1"] for name in names]
    axes.bar(range(len(names)), values, color=theme.student, width=0.6)
    for i, value in enumerate(values):
        axes.annotate(f"{value:.1f}", (i, value), ha="center", va="bottom", fontsize=8.5, color=theme.ink)
    axes.set_xticks(range(len(names)), names)
    axes.set(title="sets of images", ylabel="top-1, %", ylim=(0, 105), xlim=(-0.8, max(len(names) - 0.2, 1.8)))


def _corruptions(axes: Axes, theme: Theme, results: Mapping[str, Any]) -> None:
    found = results["corruptions"]
    severities = sorted({s for row in found["top1"].values() for s in row})
    table = [[row.get(s, float("nan")) for s in severities] for row in found["top1"].values()]
    axes.imshow(table, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            ink = "#000000" if value > 60 else "#ffffff"
            axes.annotate(f"{value:.0f}", (x, y), ha="center", va="center", fontsize=7.5, color=ink)
    axes.set_xticks(range(len(severities)), severities)
    axes.set_yticks(range(len(table)), [name.replace("_", " ") for name in found["top1"]])
    axes.grid(visible=False)
    score = "" if found["mean_error"] is None else f", mean error {found['mean_error']:.1f} %"
    score = score if found["mce"] is None else f", mCE {found['mce']:.1f} %"
    axes.set(title=f"corruptions, top-1{score}", xlabel="severity")


def _occlusion(axes: Axes, theme: Theme, results: Mapping[str, Any]) -> None:
    start = [(0.0, results["sets"]["clean"]["top1"])] if "clean" in results["sets"] else []
    for (how, tops), colour, marker in zip(results["occlusion"].items(), (theme.student, theme.teacher), "os"):
        points = [*start, *((100 * float(ratio), top1) for ratio, top1 in tops.items())]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=how)
    axes.set(title="hidden patches", xlabel="share hidden, %", ylabel="top-1, %", ylim=(0, 105))
    axes.legend()


def _shuffle(axes: Axes, theme: Theme, results: Mapping[str, Any]) -> None:
    start = [("1", results["sets"]["clean"]["top1"])] if "clean" in results["sets"] else []
    names, values = zip(*start, *results["shuffle"].items(), strict=True)
    axes.plot(range(len(names)), values, color=theme.student, marker="o")
    axes.set_xticks(range(len(names)), [f"{name} x {name}" for name in names])
    axes.set(title="shuffled cells", xlabel="cells", ylabel="top-1, %", ylim=(0, 105))


_PANELS: dict[str, Panel] = {"corruptions": _corruptions, "occlusion": _occlusion, "shuffle": _shuffle}
