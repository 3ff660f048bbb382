"""Generated scenes: the same for the same arguments, of every class, never over something else."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lut_ds.data.scenes import CLASSES, write_scenes
from lut_ds.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_arguments_same_files(tmp_path: Path) -> None:
    one, other = (contents(write_scenes(tmp_path / name, 6, 4, 32)) for name in "ab")
    assert one == other
    assert contents(write_scenes(tmp_path / "c", 6, 4, 32, seed=1)) != one
    assert sum(name.startswith("images/training/") for name in one) == 6
    assert sum(name.startswith("annotations/validation/") for name in one) == 4


def test_masks_fit_and_every_class_occurs(tmp_path: Path) -> None:
    folder, seen = write_scenes(tmp_path / "scenes", 20, 1, 40), set()
    for path in (folder / "images" / "training").iterdir():
        with Image.open(path) as image, Image.open(folder / "annotations/training" / f"{path.stem}.png") as mask:
            assert image.size == mask.size
            assert all(40 <= side <= 60 for side in image.size)
            seen |= set(np.unique(np.asarray(mask)).tolist())
    assert seen == set(range(1, len(CLASSES) + 1))


def test_a_set_is_left_alone_and_strangers_are_not_touched(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "scenes", 2, 1, 32)
    before = (folder / "scenes.json").stat().st_mtime_ns
    write_scenes(folder, 2, 1, 32)
    assert (folder / "scenes.json").stat().st_mtime_ns == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="found other files"):
        write_scenes(tmp_path / "mine", 2, 1, 32)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
