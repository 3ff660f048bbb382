"""Accuracy by class and by the number of training images, against counting by hand."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lut_ds.config import Model
from lut_ds.data.folder import ImageFolder
from lut_ds.engine.launch import Ranks
from lut_ds.transfer.accuracy import accuracy, by_frequency
from lut_ds.transfer.export import classifier_config
from tests.data.images import write_folder


class Brightness(torch.nn.Module):
    """Logits by the mean of each channel: any model whose answers are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) @ self.weight


def test_counts_by_class(tmp_path: Path) -> None:
    source = ImageFolder(write_folder(tmp_path, 11, classes=3))
    found = accuracy(Brightness(), source, 16, Ranks(0, 1, 0, torch.device("cpu"), "none"), 4, 1)
    right = [[], [], []]  # type: list[list[bool]]
    for i in range(11):
        one = Single(source, i)
        hit = accuracy(Brightness(), one, 16, Ranks(0, 1, 0, torch.device("cpu"), "none"), 1, 1)["top1"] == 100
        right[source.label(i)].append(hit)
    shares = [100 * sum(hits) / len(hits) for hits in right]
    assert found["per_class"] == pytest.approx(shares)
    assert found["mean_class"] == pytest.approx(sum(shares) / 3)
    assert found["top1"] == pytest.approx(100 * sum(map(sum, right)) / 11)
    assert (found["top5"], found["images"]) == (100, 11)


@pytest.mark.parametrize("side, seen", [(224, [100, 0, 0]), (232, [0, 0, 100])])
def test_large_images_are_not_cropped(side: int, seen: list[float], tmp_path: Path) -> None:
    """As MAE and LUT evaluate: a blue frame around red decides only where all of the image is looked at."""
    picture = Image.new("RGB", (240, 240), (0, 0, 255))
    picture.paste((60, 0, 0), (15, 15, 225, 225))
    for name in "012":
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "one.png")
    source = ImageFolder(tmp_path)
    assert accuracy(Brightness(), source, side, Ranks(0, 1, 0, torch.device("cpu"), "none"), 3, 1)["per_class"] == seen
    config = classifier_config(Model(image_size=side, patch_size=8), "mean", source.classes, {})
    assert config["pretrained_cfg"]["crop_pct"] == {224: 0.875, 232: 1.0}[side]


class Single:
    """One image of a source."""

    def __init__(self, source: ImageFolder, i: int) -> None:
        self.source, self.i, self.classes = source, i, source.classes

    def __len__(self) -> int:
        return 1

    def read(self, i: int) -> bytes:
        return self.source.read(self.i)

    def label(self, i: int) -> int:
        return self.source.label(self.i)

    def name(self, i: int) -> str:
        return self.source.name(self.i)


@example([(50.0, 101), (10.0, 100), (5.0, 20), (1.0, 19)])
@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 300)), min_size=1, max_size=30))
def test_groups_by_training_images(classes: list[tuple[float, int]]) -> None:
    found = by_frequency([value for value, _ in classes], [count for _, count in classes])
    groups = {
        "many": [v for v, n in classes if n > 100],
        "medium": [v for v, n in classes if 20 <= n <= 100],
        "few": [v for v, n in classes if n < 20],
    }
    for name, values in groups.items():
        assert found[name] == (pytest.approx(sum(values) / len(values)) if values else None)
