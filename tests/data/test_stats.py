"""Statistics of a small folder, against numbers counted by hand."""

from pathlib import Path

import numpy as np
import pytest

from lut_ds.data.stats import survey
from tests.data.images import encode, photo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in {
        "a/1.jpg": encode(photo(40, 60), subsampling="4:4:4"),
        "a/2.jpg": encode(photo(40, 80), subsampling="4:2:0"),
        "a/3.jpg": encode(photo(50, 40).convert("L")),
        "b/4.png": encode(photo(40, 40).convert("RGBA"), "PNG"),
        "b/5.jpg": b"no image",
    }.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(data)
    (tmp_path / "data" / "c").mkdir()
    return tmp_path / "data"


def test_every_number(folder: Path) -> None:
    statistics, raw = survey(str(folder), workers=2)
    found = statistics["splits"]["train"]
    assert (found["samples"], found["measured"], found["unreadable"]) == (5, 5, 1)
    assert found["classes"] == {"count": 3, "empty": 1, "min": 0, "median": 2.0, "max": 3}
    assert found["bytes"] == sum(path.stat().st_size for path in folder.glob("*/*"))
    assert (found["width"]["p0"], found["width"]["p50"], found["width"]["p100"]) == (40, 50, 80)
    assert (found["shorter_side"]["p0"], found["shorter_side"]["p100"]) == (40, 40)
    assert (found["aspect"]["p0"], found["aspect"]["p100"]) == (0.8, 2.0)
    assert found["formats"] == {"JPEG": 3, "PNG": 1}
    assert found["modes"] == {"RGB": 2, "L": 1, "RGBA": 1}
    assert found["samplings"] == {"4:2:0": 1, "4:4:4": 1, "gray": 1}
    assert found["shards_of_1_gb"] == 1
    assert found["decode"]["images"] == 4
    assert 0 < found["decode"]["ms_per_image"] < 60_000
    assert raw["train"][1].tolist() == [3, 2, 0]


def test_a_sample_stands_for_all(photos: Path) -> None:
    whole, some = (survey(str(photos), sample)[0]["splits"]["train"] for sample in (None, 20))
    assert (some["samples"], some["measured"]) == (42, 20)
    assert some["classes"] == whole["classes"]
    assert some["bytes"] == pytest.approx(whole["bytes"], rel=0.2)
    assert some["bytes"] != whole["bytes"]


def test_histograms(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    from lut_ds.analysis.data_stats import write_histograms

    _, raw = survey(str(folder))
    paths = write_histograms(tmp_path / "out", "train", *raw["train"])
    assert [path.name for path in paths] == ["train_sizes.png", "train_classes.png"]
    assert all(np.asarray(Image.open(path).convert("L")).std() > 5 for path in paths)
    assert write_histograms(tmp_path / "none", "train", raw["train"][0][:0], raw["train"][1]) == []
