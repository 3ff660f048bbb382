"""The picture of a sweep: a line for each run and weights, a dot for each seed."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lut_ds.analysis.figures import Draw, Theme, axes_grid, new_figure


def draw_sweep(
    rows: Sequence[tuple[str, str, Mapping[str, Sequence[float]]]],
    panels: Mapping[str, str],
    baselines: Mapping[str, float],
) -> Draw:
    """Side by side, a panel for each measure.

    Args:
        rows: name, weights (`student` or `teacher`), and values by measure, one a seed; from top to bottom.
        panels: titles by measure.
        baselines: of some measures, a value to compare with: a dashed line.
    """

    def draw(theme: Theme) -> Figure:
        names = list(dict.fromkeys(name for name, _, _ in rows))
        figure = new_figure(1.9 + 2.3 * len(panels), 0.9 + 0.24 * len(names))
        marks = {"student": ("o", theme.student, -0.13), "teacher": ("D", theme.teacher, 0.13)}
        axes = axes_grid(figure, 1, len(panels))
        for axis, (measure, title) in zip(axes, panels.items(), strict=True):
            for name, weights, values in rows:
                marker, colour, shift = marks[weights]
                found = values.get(measure, ())
                place = [names.index(name) + shift] * len(found)
                axis.plot(found, place, marker, color=colour, markersize=3, alpha=0.5, linestyle="none")
                if found:
                    axis.plot([sum(found) / len(found)], place[:1], marker, color=colour, markersize=6)
            if measure in baselines:
                axis.axvline(baselines[measure], color=theme.faint, linestyle=(0, (5, 4)), linewidth=1)
            axis.set(title=title, ylim=(len(names) - 0.4, -0.6))
            axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        handles = [
            axes[0].plot([], [], marker, color=colour, linestyle="none", label=weights)[0]
            for weights, (marker, colour, _) in marks.items()
            if any(row[1] == weights for row in rows)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return figure

    return draw
