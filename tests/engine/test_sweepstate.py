"""What the folder of a sweep says of its runs: other recipes and other images are refused, nothing else."""

import shutil
from pathlib import Path

import pytest
import yaml

from lut_ds.config import load_recipe
from lut_ds.engine.sweepfile import Entry, read_sweep
from lut_ds.engine.sweepstate import check_entry, check_images
from lut_ds.errors import UserError
from tests.data.images import write_folder
from tests.engine.tiny import tiny_tree


def entry(folder: Path, *overrides: str) -> Entry:
    (folder / "base.yaml").write_text(yaml.safe_dump(tiny_tree()))
    (folder / "s.yaml").write_text("recipe: base.yaml\nruns: {a: {}}\n")
    (found,) = read_sweep(folder / "s.yaml", folder / "out", overrides).entries
    return found


def begin(run: Entry) -> None:
    """Leave what a run has written once it has begun."""
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(run.recipe.model_dump(mode="json")))
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')


def test_a_run_keeps_its_recipe(tmp_path: Path) -> None:
    begin(entry(tmp_path))
    check_entry(entry(tmp_path, "train.micro_batch=4", "data.path=elsewhere", "train.max_steps=9"))
    for override, why in (
        ("optim.blr=1", "optim.blr is .* there and 1.0 here; give the run another name"),
        ("precision.teacher=bf16", "precision.teacher is 'fp32' there and 'bf16' here"),
    ):
        with pytest.raises(UserError, match=why):
            check_entry(entry(tmp_path, override))
    (tmp_path / "out" / "runs" / "b" / "seed_0" / "a file").mkdir(parents=True)
    (tmp_path / "s.yaml").write_text("recipe: base.yaml\nruns: {b: {}}\n")
    with pytest.raises(UserError, match="exists and is no run folder"):
        check_entry(read_sweep(tmp_path / "s.yaml", tmp_path / "out").entries[0])


def test_a_run_keeps_its_images(tmp_path: Path) -> None:
    data, copy, other, larger = (tmp_path / name for name in ("data", "copy", "other", "larger"))
    write_folder(data, 6)
    shutil.copytree(data, copy)
    write_folder(other, 6, height=44)  # other pictures of the same names
    write_folder(larger, 8)
    begin(entry(tmp_path, f"data.path={data}"))
    for same in (data, copy):
        assert check_images(entry(tmp_path, f"data.path={same}")) is None
    for path, counts in (
        (other, "6 in 2 classes, that of .*/other has 6 others in 2"),
        (larger, "6 .* has 8 others in 2"),
    ):
        with pytest.raises(UserError, match=f"on other images: its train set .*/data. has {counts}; name the same"):
            check_images(entry(tmp_path, f"data.path={path}"))
    shutil.rmtree(data)
    assert check_images(entry(tmp_path, f"data.path={other}")) == str(data)  # moved, or other ones: nobody can tell


def test_a_run_keeps_its_images_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a relative path meant where the sweep began is known where it goes on."""
    for folder, height in (("one", 40), ("two", 44)):
        write_folder(tmp_path / folder / "data", 6, height=height)
    monkeypatch.chdir(tmp_path / "one")
    begun = entry(tmp_path, "data.path=data")
    assert begun.recipe.data.path == str(tmp_path / "one" / "data")
    assert load_recipe(begun.words[0], begun.words[1:]) == begun.recipe
    begin(begun)
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(UserError, match=r"on other images: its train set .*/one/data. has 6 in 2"):
        check_images(entry(tmp_path, "data.path=data"))
    assert check_images(entry(tmp_path, "data.path=../one/data")) is None
