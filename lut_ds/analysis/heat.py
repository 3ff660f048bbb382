"""Heat maps over images: a column an image, a row a kind of map."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lut_ds.analysis.figures import Theme, new_figure

_SIDE, _LEFT = 1.05, 1.5  # inches of a picture and of the names
_FILLED = 0.96  # of a picture's place
_LONGEST = 20  # characters of a name

Row = tuple[str, str, NDArray[np.float64]]
"""Name of the subject, of the map, and non-negative heat [n, rows, columns]."""


def draw_heat(theme: Theme, images: NDArray[np.uint8], rows: Sequence[Row]) -> Figure:
    """Images in the first row, and below each the same image under heat maps.

    Args:
        images: uint8 [n, S, S, 3].
        rows: those of a subject one after another; a map's own largest value is drawn brightest.
    """
    columns, lines = len(images), 1 + len(rows)
    figure = new_figure(_LEFT + _SIDE * columns, _SIDE * lines)
    figure.set_layout_engine(None)
    axes = figure.add_axes((0, 0, 1, 1))  # one for all: axes of their own would take seconds to draw
    axes.axis("off")
    colours = dict(zip(dict.fromkeys(name for name, _, _ in rows), (theme.student, theme.teacher)))
    for line in range(lines):
        for column in range(columns):
            place = (column, column + _FILLED, -line - _FILLED, -line)
            axes.imshow(images[column], extent=place, interpolation="nearest")
            if line:
                _overlay(axes, rows[line - 1][2][column], place)
        subject, title = rows[line - 1][:2] if line else ("", "input")
        axes.text(-0.08, -line - 0.5, title, ha="right", va="center", fontsize=9)
        if line == 1 or (line and rows[line - 2][0] != subject):
            shown = subject if len(subject) <= _LONGEST else "…" + subject[1 - _LONGEST :]
            axes.text(
                -0.08, -line - 0.15, shown, ha="right", va="center", weight="bold", fontsize=9, color=colours[subject]
            )
    axes.set(xlim=(-_LEFT / _SIDE, columns), ylim=(-lines, 0), aspect="auto")
    return figure


def _overlay(axes: Axes, heat: NDArray[np.float64], place: tuple[float, float, float, float]) -> None:
    """The map over a dimmed image: without heat the image stays dark, so that little heat does not look like some."""
    axes.imshow(np.zeros((1, 1, 3)), extent=place, alpha=0.45)
    shown = np.clip(heat / (float(heat.max()) or 1.0), 0, 1)
    axes.imshow(shown, cmap="inferno", vmin=0, vmax=1, alpha=0.85 * shown, extent=place, interpolation="nearest")
