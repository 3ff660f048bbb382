"""mIoU against counting by hand, windows against the whole image."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_ds.transfer.segmentation.augment import fitted_size
from lut_ds.transfer.segmentation.miou import confusion, scores
from lut_ds.transfer.segmentation.sliding import classes_at, passes, slide, starts


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_scores_equal_counting_by_hand(data: st.DataObject) -> None:
    classes, pixels = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 40))
    predicted = data.draw(st.lists(st.integers(0, classes - 1), min_size=pixels, max_size=pixels))
    truth = data.draw(st.lists(st.sampled_from([*range(classes), 255]), min_size=pixels, max_size=pixels))
    pairs = [(p, t) for p, t in zip(predicted, truth) if t != 255]
    found = scores(confusion(torch.tensor(predicted), torch.tensor(truth), classes))
    ious, accuracies = [], []
    for c in range(classes):
        both = sum(p == t == c for p, t in pairs)
        either = sum(c in pair for pair in pairs)
        there = sum(t == c for _, t in pairs)
        assert found["iou"][c] is None if not either else math.isclose(found["iou"][c], 100 * both / either)
        ious += [100 * both / either] if either else []
        accuracies += [100 * both / there] if there else []
    if pairs:
        assert math.isclose(found["miou"], sum(ious) / len(ious))
        assert math.isclose(found["macc"], sum(accuracies) / len(accuracies))
        assert math.isclose(found["aacc"], 100 * sum(p == t for p, t in pairs) / len(pairs))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 300), side=st.integers(1, 80), data=st.data())
def test_windows_cover_every_pixel_and_none_beyond(size: int, side: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, side))
    found = starts(size, side, stride)
    covered = {pixel for start in found for pixel in range(start, start + side)}
    assert set(range(size)) <= covered
    assert max(covered) < max(size, side)
    assert len(set(found)) == len(found)
    if size <= side:
        assert found == [0]


def colour_logits(pixels: torch.Tensor) -> torch.Tensor:
    """A model that sees each pixel alone: its windows agree."""
    return pixels.permute(0, 3, 1, 2).float() @ torch.eye(pixels.shape[2])


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 40), width=st.integers(1, 40), stride=st.integers(1, 16), batch=st.integers(1, 5))
def test_windows_of_any_image_average_to_it(height: int, width: int, stride: int, batch: int) -> None:
    pixels = torch.from_numpy(np.random.default_rng(height * 41 + width).integers(0, 256, (height, width, 3), np.uint8))
    calls = []

    def counted(windows: torch.Tensor) -> torch.Tensor:
        calls.append(windows.shape)
        return colour_logits(windows)

    found = slide(counted, pixels, 16, stride, batch)
    torch.testing.assert_close(found, pixels.permute(2, 0, 1).float())
    assert calls == [(batch, 16, 16, 3)] * passes(height, width, 16, stride, batch)


def test_one_window_is_the_whole_image() -> None:
    """A model that sees all of the image at once: what it says is passed on as it is."""
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)

    def contextual(windows: torch.Tensor) -> torch.Tensor:
        return windows.permute(0, 3, 1, 2).float() + windows.float().mean(dim=(1, 2, 3))[:, None, None, None]

    assert torch.equal(slide(contextual, pixels, 16, 11, 1), contextual(pixels[None])[0])


@settings(deadline=None, max_examples=20)
@given(classes=st.integers(1, 40), height=st.integers(1, 20), width=st.integers(1, 20))
def test_classes_equal_the_largest_of_all_logits_at_once(classes: int, height: int, width: int) -> None:
    logits = torch.randn(classes, 7, 9, generator=torch.Generator().manual_seed(classes))
    whole = F.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    assert torch.equal(classes_at(logits, height, width), whole.argmax(0))


@settings(max_examples=60)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_images_keep_their_shape(height: int, width: int) -> None:
    found = fitted_size(height, width, 512)
    assert min(found) <= 512
    assert max(found) <= 4 * 512
    assert min(found) == 512 or max(found) == 4 * 512
    assert abs(found[0] * width - found[1] * height) <= max(height, width)
