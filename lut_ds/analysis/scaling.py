"""Predicted scaling of a run, as a picture."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from lut_ds.analysis.figures import Theme, axes_grid, new_figure


def draw_scaling(planned: dict[str, Any], theme: Theme) -> Figure:
    """Images/s and efficiency by number of GPUs, of what `lut-ds plan` returns."""
    figure = new_figure(9.0, 3.6)
    speed, efficiency = axes_grid(figure, 1, 2)
    weak = planned["scaling"]["weak"]
    strong = [row for row in planned["scaling"]["strong"] if "why_not" not in row]
    series = (
        (weak, "weak: as many images a GPU", theme.student, "o"),
        (strong, "strong: the same global batch", theme.teacher, "s"),
    )
    for rows, label, colour, marker in series:
        gpus = [row["gpus"] for row in rows]
        speed.plot(gpus, [row["images_per_s"] for row in rows], color=colour, marker=marker, markersize=4, label=label)
        efficiency.plot(
            gpus, [row["efficiency"] for row in rows], color=colour, marker=marker, markersize=4, label=label
        )
    first = weak[0]["images_per_s"]
    counts = [row["gpus"] for row in weak]
    speed.plot(counts, [first * n for n in counts], color=theme.faint, linestyle=":", label="linear")
    speed.set_yscale("log")
    efficiency.axhline(planned["weak_scaling_target"]["wanted"], color=theme.faint, linestyle=":")
    efficiency.set_ylim(0, 1.05)
    _label(speed, "images/s", f"{planned['recipe']} on {planned['gpu']}, predicted")
    _label(efficiency, "efficiency", "Share of linear scaling")
    speed.legend(loc="upper left")
    return figure


def _label(axes: Axes, quantity: str, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("GPUs")
    axes.set_ylabel(quantity)
    axes.set_title(title)
