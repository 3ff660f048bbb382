import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lut_ds.analysis.curves import (
    TITLES,
    binned,
    curve_keys,
    draw_accuracy,
    draw_curves,
    run_metrics,
    write_curves,
)
from lut_ds.analysis.figures import DARK, LIGHT, png
from lut_ds.errors import UserError


def records(values, **more):
    return [{"step": i + 1, "epoch": (i + 1) / 4, "lr": 1e-3, "loss": v, **more} for i, v in enumerate(values)]


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=80), bins=st.integers(1, 100))
def test_bins_lose_no_extreme_and_no_step(values, bins):
    epoch, mean, low, high = binned(records(values), "loss", bins)
    assert len(epoch) == min(bins, len(values))
    assert (np.diff(epoch) > 0).all()
    finite = [v for v in values if v is not None]
    if not finite:
        assert np.isnan(mean).all()
        return
    assert np.nanmin(low) == min(finite)
    assert np.nanmax(high) == max(finite)
    known = np.isfinite(mean)
    assert (low[known] <= mean[known] + 1e-6 * abs(mean[known]) + 1e-9).all()
    assert (mean[known] <= high[known] + 1e-6 * abs(mean[known]) + 1e-9).all()


def test_mae_runs_have_no_doubled_panel(lut_run, mae_run):
    assert curve_keys(run_metrics(lut_run)) == ["loss", "mae", "bc", "feature_spread", "lr", "grad_norm"]
    assert curve_keys(run_metrics(mae_run)) == ["loss", "feature_spread", "lr", "grad_norm"]


def test_axes_start_at_zero_hold_every_value_and_cover_the_run(lut_run):
    metrics = run_metrics(lut_run)
    figure = draw_curves(metrics)(LIGHT)
    by_title = {axis.get_title(loc="left") or axis.get_title(): axis for axis in figure.axes}
    for key in curve_keys(metrics):
        axis = by_title[TITLES[key]]
        assert axis.get_ylim()[0] == 0
        assert axis.get_ylim()[1] >= max(record[key] for record in metrics)
        assert axis.get_xlim() == (0, metrics[-1]["epoch"])


def test_steps_that_were_not_applied_are_marked():
    metrics = records([1.0, None, 2.0], grad_norm=0.1)
    metrics[1]["applied"] = 0.0
    marks = [line for axis in draw_curves(metrics)(LIGHT).axes for line in axis.lines if line.get_marker() == "|"]
    assert len(marks) == 3
    assert all(list(mark.get_xdata()) == [0.5] for mark in marks)


def test_a_run_without_one_finite_loss_still_draws():
    assert png(draw_curves(records([None, math.nan, None])))[:4] == b"\x89PNG"


def test_accuracy_names_baselines_and_series():
    draw = draw_accuracy([0, 1, 2], {"student": [50, 60, 70.5], "teacher": [50, 55, 72]}, {"raw pixels": 98.04}, "t")
    axis = draw(DARK).axes[0]
    assert [text.get_text() for text in axis.texts] == ["raw pixels, 98.0 %"]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["student, 70.5 % at the end", "teacher, 72.0 % at the end"]
    assert axis.get_ylim()[0] <= 50
    assert axis.get_ylim()[1] >= 100


def test_the_png_is_written_whole_and_differs_by_theme(lut_run, tmp_path):
    path = write_curves(lut_run, tmp_path / "curves.png")
    with Image.open(path) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    draw = draw_curves(run_metrics(lut_run))
    assert png(draw, LIGHT) != png(draw, DARK)


def test_a_folder_without_metrics_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="found no such file"):
        write_curves(tmp_path, tmp_path / "curves.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="found an empty file"):
        run_metrics(tmp_path)
