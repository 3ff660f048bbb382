"""Curves of a run from its metrics.jsonl, and of an evaluation over the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lut_ds.analysis.figures import Draw, Theme, axes_grid, new_figure, png, write_aside
from lut_ds.errors import UserError
from lut_ds.tracking import read_metrics

Records = Sequence[Mapping[str, Any]]

TITLES = {
    "loss": "Total loss",
    "mae": "Reconstruction loss (mae)",
    "bc": "Broader-contextualization loss (bc)",
    "feature_spread": "Spread of the student's pooled features",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
}
SPEED = {"images_per_s": "Images a second", "data_wait": "Share of the time spent waiting for data"}
"""Recorded now and then, not at every step."""
_BINS = 240


def run_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl.

    Raises:
        UserError: there are none.
    """
    path = Path(run) / "metrics.jsonl"
    records = read_metrics(path)
    if not records:
        found = "an empty file" if path.is_file() else "no such file"
        raise UserError(f"run: {path}: expected metrics of at least one step, found {found}; name a run folder")
    return records


def curve_keys(records: Records) -> list[str]:
    """What is worth a panel: the metrics that the run recorded, without those that repeat the total loss."""
    present = [key for key in TITLES if any(key in record for record in records)]
    repeats = "bc" not in present and "loss" in present
    return [key for key in present if not (key == "mae" and repeats)]


def binned(
    records: Records, key: str, bins: int = _BINS
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """A metric over the run in at most `bins` groups of consecutive steps.

    Returns:
        epoch, mean, lowest and highest of each group, float64 [n]; steps without a finite value are left out of a group,
        and a group without any is NaN.
    """
    epochs = np.array([record["epoch"] for record in records], float)
    values = np.array([np.nan if record.get(key) is None else record[key] for record in records], float)
    groups = np.array_split(np.arange(len(values)), min(bins, len(values)))
    rows = []
    for group in groups:
        finite = values[group][np.isfinite(values[group])]
        low, mean, high = (finite.min(), finite.mean(), finite.max()) if len(finite) else (np.nan,) * 3
        rows.append((epochs[group].mean(), mean, low, high))
    epoch, mean, low, high = np.array(rows).T
    return epoch, mean, low, high


def draw_curves(records: Records) -> Draw:
    """Small multiples of the run's metrics over epochs, see `draw_runs`."""
    return draw_runs([("", records)], curve_keys(records))


def draw_runs(runs: Sequence[tuple[str, Records]], keys: Sequence[str]) -> Draw:
    """Small multiples of metrics over epochs, all runs in the same axes. Every axis starts at zero and none is clipped.

    A line is the mean of a few consecutive steps, the band around it their lowest and highest value. Steps that were not
    applied (non-finite loss or gradient) are ticks on the axis.

    Args:
        runs: name and records of each; one run alone needs no name.
        keys: of TITLES and SPEED, a panel each.
    """

    def draw(theme: Theme) -> Figure:
        rows = -(-len(keys) // 2)
        figure = new_figure(8.2, 2.35 * rows)
        axes = axes_grid(figure, rows, 2)
        for axis, key in zip(axes, keys, strict=False):
            _draw_metric(axis, runs, key, theme)
        for axis in axes[len(keys) :]:
            axis.remove()
        if len(runs) > 1:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=min(3, len(runs)))
        return figure

    return draw


def _draw_metric(axis: Axes, runs: Sequence[tuple[str, Records]], key: str, theme: Theme) -> None:
    top, end = 0.0, 1e-9
    for (name, records), (colour, style) in zip(runs, theme.series(len(runs)), strict=True):
        end = max(end, float(records[-1]["epoch"]))
        known = [record for record in records if key in record]
        axis.plot(
            [], [], color=colour, linestyle=style, label=name.replace("$", r"\$")
        )  # in the legend, whatever this panel holds
        if not known:
            continue
        epoch, mean, low, high = binned(known, key)
        if key != "lr":
            axis.fill_between(epoch, low, high, color=colour, alpha=0.22 if len(runs) == 1 else 0.12, linewidth=0)
        axis.plot(epoch, mean, color=colour, linestyle=style)
        skipped = [record["epoch"] for record in known if record.get("applied") == 0]
        if skipped:
            axis.plot(skipped, np.zeros(len(skipped)), "|", color=theme.warning, markersize=10, clip_on=False)
        top = max(top, float(np.nanmax(high)) if np.isfinite(high).any() else 0.0)
    axis.set_title({**TITLES, **SPEED}[key])
    axis.set_xlabel("epoch")
    axis.set_xlim(0, end)
    axis.set_ylim(0, 1.06 * top if top > 0 else 1.0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)


def write_curves(run: str | Path, path: str | Path) -> Path:
    """Draw a run's curves into a PNG.

    Raises:
        UserError: the run has no metrics.
    """
    return write_aside(Path(path), png(draw_curves(run_metrics(run))))


def draw_accuracy(
    epochs: Sequence[float],
    series: Mapping[str, Sequence[float]],
    baselines: Mapping[str, float],
    title: str,
) -> Draw:
    """Accuracy over the run, per cent on an axis that ends at 100.

    Args:
        epochs: of the evaluations.
        series: values at those epochs by name; `student` and `teacher` have colours and markers of their own.
        baselines: values that do not change over the run, drawn as dashed lines with their names.
        title: of the picture.
    """

    def draw(theme: Theme) -> Figure:
        figure = new_figure(8.2, 3.7)
        (axis,) = axes_grid(figure, 1, 1)
        markers = {"student": ("o", theme.student), "teacher": ("D", theme.teacher)}
        last = max(epochs) if max(epochs) > 0 else 1.0
        for (name, values), (other, _) in zip(series.items(), theme.series(len(series)), strict=True):
            marker, colour = markers.get(name, ("s", other))
            axis.plot(
                epochs,
                values,
                marker=marker,
                markersize=5,
                color=colour,
                label=f"{name}, {values[-1]:.1f} % at the end",
            )
        for name, value in baselines.items():
            axis.axhline(value, color=theme.faint, linewidth=1.2, linestyle=(0, (5, 4)))
            axis.annotate(
                f"{name}, {value:.1f} %",
                (last, value),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                fontsize=8.5,
                color=theme.ink,
            )
        lowest = min([*baselines.values(), *(v for values in series.values() for v in values)])
        axis.set_ylim(max(0.0, 10 * np.floor((lowest - 5) / 10)), 101.5)
        axis.set_xlim(-0.015 * last, 1.015 * last)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.set_ylabel("top-1, %" if markers.keys() & series.keys() else "%")
        axis.legend(loc="best")
        return figure

    return draw
