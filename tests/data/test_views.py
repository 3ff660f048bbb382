"""View parameters: in range, distributed as published, and functions of (seed, epoch, sample, view) alone."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lut_ds.data.views import (
    LUT_VIEW1,
    LUT_VIEW2,
    MAE_VIEW,
    Photometric,
    ViewParams,
    ViewSpec,
    apply_reference,
    eval_params,
    resized_hw,
    view_params,
)
from tests.data.images import photo

SIZES = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=30)
SPECS = st.sampled_from([LUT_VIEW1, LUT_VIEW2, MAE_VIEW])


def draw(spec: ViewSpec, sizes: list[tuple[int, int]], size: int = 64, seed: int = 0, view: int = 0) -> ViewParams:
    return view_params(spec, size, seed, 0, np.arange(len(sizes)), view, np.array(sizes, np.int32))


@given(sizes=SIZES, spec=SPECS, size=st.integers(8, 256), seed=st.integers(0, 2**63))
def test_windows_lie_where_they_may(sizes: list[tuple[int, int]], spec: ViewSpec, size: int, seed: int) -> None:
    p = draw(spec, sizes, size, seed)
    hw = np.array(sizes)
    if spec.kind == "resize_crop":
        assert (p.resize_hw.min(axis=1) == size).all()
        assert (p.crop_yx >= -spec.pad).all()
        assert (p.crop_yx + size <= p.resize_hw + spec.pad).all()
    else:
        assert (p.resize_hw == size).all()
        assert (p.crop_yx >= 0).all()
        assert (p.crop_hw >= 1).all()
        assert (p.crop_yx + p.crop_hw <= hw).all()


@given(sizes=SIZES, size=st.integers(8, 256))
def test_sizes_are_torchvisions(sizes: list[tuple[int, int]], size: int) -> None:
    found = resized_hw(np.array(sizes, np.int32), size)
    for (h, w), (rh, rw) in zip(sizes, found.tolist()):
        short, long = min(h, w), max(h, w)
        new = (size, int(size * long / short))
        assert (rh, rw) == (new if h <= w else new[::-1])


@given(sizes=SIZES, size=st.integers(8, 256))
def test_eval_crop_is_central(sizes: list[tuple[int, int]], size: int) -> None:
    p = eval_params(size, np.array(sizes, np.int32))
    after = p.resize_hw - p.crop_yx - size
    assert (np.abs(p.crop_yx - after) <= 1).all()
    assert (p.crop_yx >= 0).all()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    sizes = [(90 + i, 120) for i in range(10)]
    together = draw(LUT_VIEW2, sizes)
    alone = view_params(LUT_VIEW2, 64, 0, 0, np.array([7]), 0, np.array([sizes[7]], np.int32))
    for f in fields(ViewParams):
        assert np.array_equal(getattr(together, f.name)[7], getattr(alone, f.name)[0]), f.name


@pytest.mark.parametrize("change", [{"seed": 1}, {"view": 1}])
def test_views_and_seeds_draw_apart(change: dict[str, int]) -> None:
    sizes = [(300, 400)] * 200
    a, b = draw(LUT_VIEW2, sizes), draw(LUT_VIEW2, sizes, **change)
    for name in ("crop_yx", "flip", "jitter", "factors", "op_order", "choice", "blur_sigma"):
        assert not np.array_equal(getattr(a, name), getattr(b, name)), name
    assert abs(np.corrcoef(a.blur_sigma, b.blur_sigma)[0, 1]) < 0.25


def test_published_distributions() -> None:
    n = 20000
    p = draw(LUT_VIEW2, [(300, 400)] * n, size=224)
    assert abs(p.flip.mean() - 0.5) < 0.02
    assert abs(p.jitter.mean() - 0.8) < 0.02
    assert np.allclose(np.bincount(p.choice, minlength=3) / n, 1 / 3, atol=0.02)
    assert len(np.unique(p.op_order, axis=0)) == 24
    assert (np.sort(p.op_order, axis=1) == np.arange(4)).all()
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        values = p.factors[:, column]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() < high
        assert abs(values.mean() - (low + high) / 2) < 0.02
    assert 0.1 <= p.blur_sigma.min() < p.blur_sigma.max() < 2.0
    for axis, spare in ((0, 8), (1, 298 + 8 - 224)):  # offsets from -pad: every one of them, equally often
        counts = np.bincount(p.crop_yx[:, axis] + 4, minlength=spare + 1)
        assert len(counts) == spare + 1
        assert ((counts - n / (spare + 1)) ** 2 / (n / (spare + 1))).sum() < 3 * (spare + 1)


def test_resized_crop_distribution_matches_torchvision() -> None:
    """Areas and aspects of 4,000 windows against torchvision's own draws: the same means and quantiles."""
    import torch
    from torchvision.transforms import RandomResizedCrop

    n, h, w = 4000, 300, 400
    torch.manual_seed(0)
    image = torch.zeros(1, h, w)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)], float)
    p = draw(MAE_VIEW, [(h, w)] * n)
    ours = np.concatenate([p.crop_yx, p.crop_hw], axis=1).astype(float)
    for column in range(4):
        a, b = ours[:, column], theirs[:, column]
        assert np.abs(np.quantile(a, [0.1, 0.3, 0.5, 0.7, 0.9]) - np.quantile(b, [0.1, 0.3, 0.5, 0.7, 0.9])).max() < 12
    area = ours[:, 2] * ours[:, 3] / (h * w)
    assert 0.19 < area.min() < area.max() < 1.001


def test_resized_crop_falls_back_to_the_centre() -> None:
    p = draw(MAE_VIEW, [(10, 500), (500, 10), (1, 1)])
    assert p.crop_hw.tolist() == [[10, 13], [13, 10], [1, 1]]
    assert p.crop_yx.tolist() == [[0, 243], [243, 0], [0, 0]]


def test_flags_switch_parts_off() -> None:
    plain = draw(replace(LUT_VIEW1, hflip=0.0), [(50, 60)] * 100)
    assert not plain.flip.any()
    assert (plain.choice == -1).all()
    never = draw(replace(LUT_VIEW2, photometric=Photometric(p=0.0)), [(50, 60)] * 100)
    assert not never.jitter.any()
    assert (never.choice >= 0).all()


def test_a_pad_that_cannot_reflect() -> None:
    with pytest.raises(ValueError, match="pad"):
        draw(replace(LUT_VIEW1, pad=64), [(50, 60)], size=64)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_reference_takes_any_mode(mode: str) -> None:
    image = photo(31, 47).convert(mode)
    view = apply_reference(draw(LUT_VIEW2, [(31, 47)], size=24).row(0), LUT_VIEW2, image)
    assert view.shape == (24, 24, 3)
    assert view.dtype == np.uint8
