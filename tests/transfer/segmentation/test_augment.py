"""Augmentation moves image and mask alike, keeps pixels without a class, and is a function of its draws."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lut_ds.transfer.segmentation.augment import DRAWS, PHOTOMETRIC_DRAWS, Geometry, augment, distort

HOW = Geometry(32, (0.5, 2.0), 0.75, 0.5)
draws = st.lists(st.floats(0, 1, exclude_max=True), min_size=DRAWS, max_size=DRAWS)


def scene(height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """Large areas whose red is 40 times their class; the right edge has none, and green 255."""
    y, x = np.mgrid[0:height, 0:width]
    mask = (4 * y // height + x // 8 % 2).astype(np.uint8)
    pixels = np.stack([mask * 40, 0 * mask, 0 * mask], axis=2)
    mask[:, -8:] = 255
    pixels[:, -8:] = (0, 255, 0)
    return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray(mask)


@settings(deadline=None, max_examples=40)
@given(draws=draws, height=st.integers(24, 90), width=st.integers(24, 90))
def test_image_and_mask_stay_together(draws: list[float], height: int, width: int) -> None:
    image, mask = augment(*scene(height, width), draws, HOW)
    assert image.size == mask.size == (32, 32)
    pixels, values = np.asarray(image).astype(int), np.asarray(mask)
    assert set(np.unique(values)) <= {0, 1, 2, 3, 4, 255}
    # Away from edges, where bilinear and nearest differ, colours say the class.
    inner = np.ones_like(values, bool)
    for shift in (-2, -1, 1, 2):
        for axis in (0, 1):
            inner &= np.roll(values, shift, axis) == values
    inner[:2], inner[-2:], inner[:, :2], inner[:, -2:] = False, False, False, False
    labelled = inner & (values != 255)
    assert np.abs(pixels[..., 0] - 40 * values.astype(int))[labelled].max(initial=0) <= 1
    unlabelled = pixels[inner & (values == 255)]
    # Without a class are the green edge, and what is beyond the image, which is the mean colour.
    assert all(tuple(p) in {(0, 255, 0), (124, 116, 104)} for p in unlabelled.tolist())


@given(draws=draws)
@settings(deadline=None, max_examples=20)
def test_flip_mirrors_both(draws: list[float]) -> None:
    one = augment(*scene(40, 60), [*draws[:-1], 0.9], HOW)
    other = augment(*scene(40, 60), [*draws[:-1], 0.1], HOW)
    for plain, flipped in zip(one, other, strict=True):
        assert np.array_equal(np.asarray(plain)[:, ::-1], np.asarray(flipped))


def test_crops_of_one_class_are_drawn_again() -> None:
    """The left half is one class: a crop drawn there is passed over for the next one that is mixed."""
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 64:] = np.arange(64)[None] % 5
    picture = Image.fromarray(np.zeros((64, 128, 3), np.uint8)), Image.fromarray(mask)
    how = Geometry(32, (2.0, 2.0), 0.75, 0.0)
    left, right = [0.0, 0.0], [0.99, 0.0]
    values = np.asarray(augment(*picture, [0.0, *left, *right, *left * 8, 0.9], how)[1])
    assert len(np.unique(values)) == 5
    always_left = np.asarray(augment(*picture, [0.0, *left * 10, 0.9], how)[1])
    assert set(np.unique(always_left)) == {0}, "after ten draws the last crop is taken"
    anything = Geometry(32, (2.0, 2.0), 1.0, 0.0)
    assert set(np.unique(np.asarray(augment(*picture, [0.0, *left, *right * 9, 0.9], anything)[1]))) == {0}


@settings(deadline=None, max_examples=30)
@given(draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=PHOTOMETRIC_DRAWS, max_size=PHOTOMETRIC_DRAWS))
def test_photometric_keeps_size_and_type(draws: list[float]) -> None:
    found = distort(scene(20, 30)[0], draws)
    assert (found.mode, found.size) == ("RGB", (30, 20))


def test_photometric_by_hand() -> None:
    gray = Image.new("RGB", (4, 4), (100, 100, 100))
    never = [0.9] * PHOTOMETRIC_DRAWS

    def pixel(**changes: float) -> tuple[int, ...]:
        given = [changes.get(f"d{i}", value) for i, value in enumerate(never)]
        return np.asarray(distort(gray, given))[0, 0].tolist()

    assert pixel() == [100, 100, 100]
    assert pixel(d0=0.0, d1=1.0) == [132, 132, 132]
    assert pixel(d3=0.0, d4=1.0) == [150, 150, 150]
    assert pixel(d2=0.0, d3=0.0, d4=0.0) == [50, 50, 50]
    assert pixel(d0=0.0, d1=0.0) == [68, 68, 68]
    red = Image.new("RGB", (4, 4), (200, 20, 20))
    turned = np.asarray(distort(red, [0.9] * 7 + [0.0, 1.0]))[0, 0].tolist()
    assert turned[1] > 60, "hue towards yellow"
    assert turned[0] == 200
    washed = np.asarray(distort(red, [0.9] * 5 + [0.0, 0.0, 0.9, 0.9]))[0, 0].tolist()
    assert washed[0] == 200
    assert washed[1] > 80, "half of the saturation"
