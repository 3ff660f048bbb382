"""The embedded digits: complete, stratified, written once, never over somebody's files."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lut_ds.data.digits import write_digits
from lut_ds.data.sources import ImageFolder
from lut_ds.errors import UserError


def test_splits_are_stratified_and_complete(digits: Path) -> None:
    train, val = ImageFolder(digits), ImageFolder(digits, "val")
    assert train.classes == val.classes == [str(d) for d in range(10)]
    assert len(train) + len(val) == 1797
    for source, share in ((train, 0.8), (val, 0.2)):
        counts = Counter(source.label(i) for i in range(len(source)))
        assert all(abs(counts[d] / 180 - share) < 0.05 for d in range(10))
    image = Image.open(train.name(0))
    assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "JPEG")
    assert np.asarray(image).max() > 200


def test_second_call_changes_nothing_and_a_lost_file_comes_back(tmp_path: Path) -> None:
    root = write_digits(tmp_path / "d", 16)
    one = next((root / "train" / "3").iterdir())
    before, content = one.stat().st_mtime_ns, one.read_bytes()
    assert write_digits(root, 16) == root
    assert one.stat().st_mtime_ns == before
    one.unlink()
    write_digits(root, 16)
    assert one.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_another_size_is_written_again(tmp_path: Path) -> None:
    root = write_digits(tmp_path / "d", 16)
    write_digits(root, 24)
    assert Image.open(next((root / "val" / "0").iterdir())).size == (24, 24)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="found other files"):
        write_digits(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
