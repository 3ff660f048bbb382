"""Histograms of a data set: sizes, files, classes."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lut_ds.analysis.figures import Draw, Theme, axes_grid, new_figure, png, write_aside

_BINS = 60


def write_histograms(folder: Path, split: str, measured: NDArray[np.void], counts: NDArray[np.int64]) -> list[Path]:
    """PNGs of the MEASURE records (see lut_ds.data.stats) of a split and of the int64 samples `counts` [classes] of its classes."""
    good = measured[measured["width"] > 0]
    if not len(good):
        return []
    width, height = good["width"].astype(float), good["height"].astype(float)
    sizes: dict[str, NDArray[Any]] = {
        "shorter side, pixels": np.minimum(width, height),
        "longer side, pixels": np.maximum(width, height),
        "width / height": width / height,
        "file, kB": good["bytes"] / 1e3,
    }
    paths = [write_aside(folder / f"{split}_sizes.png", png(_draw(sizes, "images")))]
    if len(counts):
        paths.append(
            write_aside(folder / f"{split}_classes.png", png(_draw({"samples of a class": counts}, "classes")))
        )
    return paths


def _draw(panels: dict[str, NDArray[Any]], unit: str) -> Draw:
    def draw(theme: Theme) -> Figure:
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure = new_figure(4.2 * columns, 2.6 * rows)
        for axis, (title, values) in zip(axes_grid(figure, rows, columns), panels.items()):
            axis.hist(values, bins=_bins(values).tolist(), color=theme.student)
            middle = float(np.median(values))
            axis.axvline(middle, color=theme.warning, linewidth=1.2)
            axis.set_title(f"{title} (median {middle:,.4g})")
            axis.set_ylabel(unit)
        return figure

    return draw


def _bins(values: NDArray[Any]) -> NDArray[np.float64]:
    """Bin edges to the 99.5th percentile, which a few giants would otherwise push together; the last bin holds them too."""
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    edges = np.linspace(low, max(high, low + 1e-3 * abs(low) + 1e-9), _BINS + 1)
    edges[-1] = max(edges[-1], float(values.max()))
    return edges
