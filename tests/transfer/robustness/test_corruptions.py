"""Corruptions: pure functions of (seed, sample), as strong as their severity, and equal to loops written out."""

import colorsys
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, zoom

from lut_ds.transfer.robustness.corruptions import CORRUPTIONS, EXTRA, MEASURED, SEVERITIES, corrupt, corrupt_batch
from lut_ds.transfer.robustness.corruptions.blur import along_line, moved
from lut_ds.transfer.robustness.corruptions.resample import along_both, blur_matrix, zoom_matrix
from lut_ds.transfer.robustness.corruptions.weather import plasma
from tests.data.images import photo

# Their published constants are not in the order of the pixels' distance: they trade dimming, displacement or repetition.
NOT_ORDERED = {"frost", "saturate", "elastic_transform", "glass_blur", "spatter"}


def pictures(side, count=3):
    return [np.asarray(photo(side, side, seed=i)) for i in range(count)]


def distance(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


def test_the_published_names():
    assert (len(MEASURED), len(EXTRA), len(CORRUPTIONS)) == (15, 4, 19)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(CORRUPTIONS)), st.sampled_from(SEVERITIES), st.sampled_from([16, 24, 32, 45, 64, 96]))
def test_any_side_gives_bytes_of_the_same_shape(name, severity, side):
    image = pictures(side, 1)[0]
    before = image.copy()
    found = corrupt(image, name, severity, 3, 5)
    assert (found.shape, found.dtype) == (image.shape, np.uint8)
    assert np.array_equal(found, corrupt(image, name, severity, 3, 5))
    assert np.array_equal(image, before)
    assert found.std() > 0


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_strength_grows_with_severity(name):
    for images in (pictures(32, 8), pictures(224, 2)):
        mean = [np.mean([distance(corrupt(x, name, s, 0, i), x) for i, x in enumerate(images)]) for s in SEVERITIES]
        assert min(mean) > 0.5
        if name not in NOT_ORDERED:
            assert all(stronger > 0.98 * weaker for weaker, stronger in itertools.pairwise(mean)), mean
            assert mean[-1] > 1.1 * mean[0], mean


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_samples_and_seeds_draw_apart_where_anything_is_drawn(name):
    image = pictures(32, 1)[0]
    drawn = [corrupt(image, name, 5, *where) for where in ((0, 0), (0, 1), (1, 0))]
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    fixed |= {"gaussian_blur", "saturate"}
    for other in drawn[1:]:
        assert np.array_equal(drawn[0], other) == (name in fixed)


def test_a_batch_is_its_images():
    images = np.stack(pictures(32, 5))
    with ThreadPoolExecutor(3) as workers:
        found = corrupt_batch(images, "snow", 3, 7, [9, 4, 4, 1, 0], workers)
    for row, (image, sample) in enumerate(zip(images, [9, 4, 4, 1, 0])):
        assert np.array_equal(found[row], corrupt(image, "snow", 3, 7, sample))


@settings(deadline=None, max_examples=25)
@given(st.integers(8, 20), st.integers(1, 3), st.integers(0, 10**6))
def test_glass_moves_pixels_as_the_published_loop(side, reach, seed):
    """The loop, with the array views of the published code: what looks like an exchange is a copy."""
    x = np.arange(side * side * 3).reshape(side, side, 3)
    shifts = np.random.default_rng(seed).integers(-reach, reach, (side - 2 * reach, side - 2 * reach, 2))
    found = x.reshape(-1, 3)[moved(side, reach, shifts)].reshape(x.shape)
    expected = x.copy()
    for i, h in enumerate(range(side - reach, reach, -1)):
        for j, w in enumerate(range(side - reach, reach, -1)):
            dx, dy = shifts[i, j]
            a, b = (h, w), (h + dy, w + dx)
            expected[a], expected[b] = expected[b], expected[a]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("sigma", [0.0, 0.7, 3.0, 40.0])
@pytest.mark.parametrize("mode", ["nearest", "reflect"])
def test_blurs_are_scipys(sigma, mode):
    x = pictures(40, 1)[0].astype(np.float32) / 255
    expected = gaussian_filter(x, (sigma, sigma, 0), mode=mode, truncate=3.0)
    assert np.allclose(along_both(blur_matrix(40, sigma, mode, 3.0), x), expected, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.11, 1.3, 2.5, 4.5])
@pytest.mark.parametrize("side", [32, 45, 224])
def test_enlargements_are_scipys(side, factor):
    x = pictures(side, 1)[0].astype(np.float32) / 255
    cropped = int(np.ceil(side / factor))
    top = (side - cropped) // 2
    whole = zoom(x[top : top + cropped, top : top + cropped], (factor, factor, 1), order=1)
    trim = (len(whole) - side) // 2
    expected = whole[trim : trim + side, trim : trim + side]
    assert np.allclose(along_both(zoom_matrix(side, factor), x), expected, atol=1e-4)


def test_brightness_and_saturation_are_those_of_hsv():
    image = pictures(224, 1)[0].copy()
    image[0, 0], image[0, 1] = (0, 0, 0), (90, 90, 90)
    places = [(0, 0), (0, 1), (5, 9), (80, 70), (100, 200)]
    bright = corrupt(image, "brightness", 3, compress=False)
    vivid = corrupt(image, "saturate", 4, compress=False)
    for place in places:
        h, s, v = colorsys.rgb_to_hsv(*(image[place] / 255))
        assert np.allclose(bright[place], 255 * np.array(colorsys.hsv_to_rgb(h, s, min(1, v + 0.3))), atol=1)
        assert np.allclose(vivid[place], 255 * np.array(colorsys.hsv_to_rgb(h, min(1, 5 * s + 0.1), v)), atol=1)


def test_noise_has_the_published_deviation():
    grey = np.full((224, 224, 3), 128, np.uint8)
    for name, severity, expected in (("gaussian_noise", 2, 0.12), ("speckle_noise", 1, 0.15 * 128 / 255)):
        found = corrupt(grey, name, severity, compress=False).astype(float) / 255
        assert found.std() == pytest.approx(expected, rel=0.03)
    shot = corrupt(grey, "shot_noise", 1, compress=False).astype(float) / 255
    assert shot.std() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.05)
    hit = corrupt(grey, "impulse_noise", 5, compress=False)
    assert (hit != 128).mean() == pytest.approx(0.27, abs=0.01)
    assert (hit == 255).mean() == pytest.approx((hit == 0).mean(), rel=0.05)


def test_photographs_are_compressed_as_the_published_files():
    image = pictures(224, 1)[0]
    assert not np.array_equal(corrupt(image, "contrast", 1), corrupt(image, "contrast", 1, compress=False))
    small = pictures(32, 1)[0]
    assert np.array_equal(corrupt(small, "contrast", 1), corrupt(small, "contrast", 1, compress=False))


def test_a_line_smears_in_its_direction():
    point = np.zeros((21, 21), np.float32)
    point[10, 10] = 1
    assert np.count_nonzero(along_line(point, 3, 2, 0)[10]) == 7
    assert np.count_nonzero(along_line(point, 3, 2, 90)[:, 10]) == 7
    assert along_line(point, 3, 2, 30).sum() == pytest.approx(1, abs=1e-5)


def test_clouds_are_rougher_the_slower_detail_shrinks():
    rough, smooth = (np.diff(plasma(64, decay, np.random.default_rng(0))).std() for decay in (1.4, 3.0))
    assert rough > 2 * smooth
    assert plasma(224, 2.0, np.random.default_rng(1)).shape == (224, 224)
