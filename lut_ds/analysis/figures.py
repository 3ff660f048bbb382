"""How every picture looks: two themes, one set of colours, PNG in and out of memory."""

import io
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 150
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; `student` and `teacher` are told apart by every common form of colour vision, and by markers."""

    ground: str
    ink: str
    faint: str
    grid: str
    student: str
    teacher: str
    warning: str
    more: tuple[str, ...]

    def series(self, count: int) -> list[tuple[str, str]]:
        """Colour and line style of each of `count` runs: where colours come again, the style is another."""
        colours = (self.student, self.teacher, *self.more)
        return [(colours[k % len(colours)], _STYLES[k // len(colours) % len(_STYLES)]) for k in range(count)]

    def apply(self) -> AbstractContextManager[None]:
        """matplotlib settings for `with`."""
        settings = {
            "figure.facecolor": self.ground,
            "axes.facecolor": self.ground,
            "savefig.facecolor": self.ground,
            "text.color": self.ink,
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "axes.edgecolor": self.faint,
            "xtick.color": self.faint,
            "ytick.color": self.faint,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
            "grid.color": self.grid,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.labelsize": 9,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "font.family": "DejaVu Sans",
            "lines.linewidth": 1.6,
        }
        return mpl.rc_context(settings)


LIGHT = Theme("#ffffff", "#1d2129", "#7b8494", "#e6e9ee", "#1f6fc4", "#d1670b", "#c22f3b", ("#1d8a63", "#8b4fc0"))
DARK = Theme("#171a20", "#e6e8ec", "#8b94a3", "#2b303a", "#6cb0ff", "#ffa657", "#ff7b85", ("#57cfa3", "#c79bff"))

Draw = Callable[[Theme], Figure]
"""Draws a picture in a theme."""


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches that needs no display and belongs to no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def axes_grid(figure: Figure, rows: int, columns: int) -> list[Axes]:
    """rows*columns axes in reading order."""
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def png(draw: Draw, theme: Theme = LIGHT) -> bytes:
    """The picture as a PNG."""
    with theme.apply():
        buffer = io.BytesIO()
        draw(theme).savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def write_aside(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path
