"""Masks: disjoint, complete, and counted as the references count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lut_ds.method.masking import disjoint_masks, keep_count


@st.composite
def draws(draw: st.DrawFn) -> tuple[Tensor, float, int]:
    """Mask noise with many ties, a ratio and a number of views that fit."""
    views = draw(st.integers(1, 2))
    patches = draw(st.integers(2, 200))
    ratio = draw(st.floats(0.5 if views == 2 else 0.01, 0.99).filter(lambda r: keep_count(patches, r) >= 1))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([1, 2, 7, 10**6]))
    noise = torch.randint(levels, (draw(st.integers(1, 4)), patches)) / levels
    return noise, ratio, views


@settings(deadline=None)
@given(draws())
def test_views_are_disjoint_and_complete(case: tuple[Tensor, float, int]) -> None:
    noise, ratio, views = case
    masking = disjoint_masks(noise, ratio, views)
    batch, patches = noise.shape
    keep, every = keep_count(patches, ratio), torch.arange(patches).expand(batch, patches)
    assert len(masking.ids_keep) == views
    assert all(ids.shape == (batch, keep) for ids in masking.ids_keep)
    seen = torch.cat(masking.ids_keep, dim=1)
    assert all(row.unique().numel() == views * keep for row in seen)
    assert torch.equal(torch.cat([masking.ids_keep[0], masking.ids_hidden], dim=1).sort(dim=1).values, every)
    assert torch.equal(masking.ids_shuffle.gather(1, masking.ids_restore), every)
    assert torch.equal(masking.ids_restore.gather(1, masking.ids_shuffle), every)
    for view in range(views):
        mask = masking.mask(view)
        assert mask.dtype == torch.float32
        assert torch.equal(mask.sum(1), torch.full((batch,), float(patches - keep)))
        assert not mask.gather(1, masking.ids_keep[view]).any()
    if views == 2:
        assert ((masking.mask(0) == 1) | (masking.mask(1) == 1)).all()


@settings(deadline=None)
@given(draws())
def test_order_is_ascending_noise_and_ties_go_by_index(case: tuple[Tensor, float, int]) -> None:
    noise, ratio, views = case
    for row, order in zip(noise.tolist(), disjoint_masks(noise, ratio, views).ids_shuffle.tolist(), strict=True):
        assert order == sorted(range(len(row)), key=lambda i: (row[i], i))


@settings(deadline=None, max_examples=30)
@given(draws())
def test_samples_are_masked_independently(case: tuple[Tensor, float, int]) -> None:
    noise, ratio, views = case
    whole = disjoint_masks(noise, ratio, views)
    for i in range(len(noise)):
        alone = disjoint_masks(noise[i : i + 1], ratio, views)
        assert torch.equal(alone.ids_hidden[0], whole.ids_hidden[i])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone.ids_keep, whole.ids_keep, strict=True))


@pytest.mark.parametrize(
    "patches,ratio,expected",
    [
        (196, 0.75, 49),
        (256, 0.75, 64),
        (16, 0.75, 4),
        (25, 0.8, 4),  # 4.9999999 in floating point
        (25, 0.5, 12),  # one patch is seen by neither view
        (25, 0.6, 10),
        (16, 0.6, 6),
        (49, 0.9, 4),
        (100, 0.9, 9),  # 9.9999999
        (4, 0.75, 1),
        (3, 0.75, 0),
    ],
)
def test_keep_count_truncates_the_floating_point_product(patches: int, ratio: float, expected: int) -> None:
    assert keep_count(patches, ratio) == expected


@pytest.mark.parametrize(
    "patches,ratio,views,fits",
    [(16, 0.4, 2, False), (16, 0.49, 2, True), (16, 0.49, 1, True), (16, 0.0, 1, True), (3, 0.75, 1, False)],
)
def test_sets_that_overlap_or_are_empty_are_refused(patches: int, ratio: float, views: int, fits: bool) -> None:
    noise = torch.rand(2, patches)
    if fits:
        assert len(disjoint_masks(noise, ratio, views).ids_keep) == views
    else:
        with pytest.raises(ValueError, match="mask_ratio"):
            disjoint_masks(noise, ratio, views)
