"""Generated shapes: every image a function of its number, classes that pixels do not tell, written like any data set."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lut_ds.cli import main
from lut_ds.data.shapes import CLASSES, render, write_shapes
from lut_ds.data.sources import ImageFolder
from lut_ds.errors import UserError


@settings(deadline=None, max_examples=20)
@given(first=st.integers(0, 2**31), count=st.integers(1, 30), size=st.integers(16, 40), seed=st.integers(0, 2**64 - 1))
def test_an_image_depends_on_its_number_alone(first: int, count: int, size: int, seed: int) -> None:
    together = render("train", range(first, first + count), size, seed)
    assert together.shape == (count, size, size, 3)
    assert together.dtype == np.uint8
    last = first + count - 1
    np.testing.assert_array_equal(together[-1:], render("train", range(last, last + 1), size, seed))
    assert (together[-1:] != render("val", range(last, last + 1), size, seed)).any()
    assert (together[-1:] != render("train", range(last, last + 1), size, seed ^ 1)).any()


def test_pixels_do_not_tell_the_classes() -> None:
    count = 1500
    images = render("train", range(count), 24, 0).reshape(count, -1) / 255.0
    labels = np.arange(count) % len(CLASSES)
    # A linear classifier by least squares, with ridge; chance is 10 %.
    held = render("val", range(500), 24, 0).reshape(500, -1) / 255.0
    mean = images.mean(axis=0)
    gram = (images - mean).T @ (images - mean) + 3.0 * np.eye(images.shape[1])
    weight = np.linalg.solve(gram, (images - mean).T @ np.eye(len(CLASSES))[labels])
    right = ((held - mean) @ weight).argmax(axis=1) == np.arange(500) % len(CLASSES)
    assert right.mean() < 0.25
    # Yet the classes differ: without light, tint and noise a shape is where its image leaves the background.
    found = render("train", range(600), 48, 1).astype(float).mean(axis=-1)
    contrast = np.abs(found - np.median(found, axis=(1, 2), keepdims=True)) > 40
    area = [contrast[i :: len(CLASSES)].mean() for i in range(len(CLASSES))]
    assert area[CLASSES.index("square")] > 1.3 * area[CLASSES.index("star")]
    assert area[CLASSES.index("disc")] > 1.3 * area[CLASSES.index("bar")]


def test_a_written_set_is_balanced_and_can_grow(tmp_path: Path) -> None:
    small, large = write_shapes(tmp_path / "a", 30, 20, 24, seed=5), write_shapes(tmp_path / "b", 45, 20, 24, seed=5)
    train, val = ImageFolder(small), ImageFolder(small, "val")
    assert train.classes == val.classes == CLASSES
    assert Counter(train.label(i) for i in range(30)) == dict.fromkeys(range(10), 3)
    assert Counter(val.label(i) for i in range(20)) == dict.fromkeys(range(10), 2)
    image = Image.open(train.name(0))
    assert (image.size, image.mode, image.format) == ((24, 24), "RGB", "JPEG")
    for path in small.glob("*/*/*.jpg"):
        assert path.read_bytes() == (large / path.relative_to(small)).read_bytes()
    written = Path(train.name(0)).stat().st_mtime_ns
    write_shapes(small, 30, 20, 24, seed=5)
    assert Path(train.name(0)).stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "arguments, why",
    [
        ((9, 20, 24), "at least 10 train images"),
        ((30, 9, 24), "at least 10 val images"),
        ((30, 20, 8), "size from 16 to 512"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, arguments: tuple[int, int, int], why: str) -> None:
    with pytest.raises(UserError, match=why):
        write_shapes(tmp_path / "a", *arguments)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made"
    assert main(["data", "shapes", str(folder), "--train", "40", "--val", "10", "--size", "16"]) == 0
    assert "40 training and 10 validation images of 10 classes" in capfd.readouterr().out
    assert len(list(folder.glob("train/*/*.jpg"))) == 40
    assert main(["data", "shapes", str(folder / "train"), "--seed", "1"]) == 2
    assert main(["data", "shapes", str(tmp_path / "b"), "--seed", "-1"]) == 2
    assert "found other files" in capfd.readouterr().err
