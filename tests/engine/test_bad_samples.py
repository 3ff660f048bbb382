"""Bad files in a run of two real ranks: it goes on, says which they are, and stops on all ranks when they are too many."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lut_ds.data.order import SampleOrder
from lut_ds.data.quarantine import read_quarantine
from lut_ds.tracking import read_metrics
from tests.engine.launching import PATIENCE, run_ranks, start_ranks
from tests.engine.test_resume import command, write_recipe

PER_CLASS = 4  # 40 images in global batches of 16: an epoch is two steps
EPOCHS, STEPS = 4, 8


@pytest.fixture
def few(digits: Path, tmp_path: Path) -> Path:
    """Four images of each digit."""
    for folder in sorted((digits / "train").iterdir()):
        target = tmp_path / "few" / folder.name
        target.mkdir(parents=True)
        for file in sorted(folder.iterdir())[:PER_CLASS]:
            shutil.copy(file, target)
    return tmp_path / "few"


def plant(few: Path) -> dict[str, str]:
    """Make three files bad: no data, half of it (which only decoding shows), a page."""
    files = sorted(few.glob("*/*.jpg"))
    bad = {str(files[3]): "empty file", str(files[17]): "cannot be decoded", str(files[31]): "expected one of JPEG"}
    files[3].write_bytes(b"")
    files[17].write_bytes(files[17].read_bytes()[:500])
    files[31].write_bytes(b"<!DOCTYPE html><html></html>")
    return bad


def test_two_ranks_go_on_and_list_each_bad_file_once(few: Path, tmp_path: Path) -> None:
    bad, run = plant(few), tmp_path / "run"
    (_, shown), _ = run_ranks(command(write_recipe(tmp_path, few, run)), 2)
    listed = read_quarantine(run / "quarantine.jsonl")
    assert sorted(entry.name for entry in listed) == sorted(bad)
    for entry in listed:
        assert bad[entry.name] in entry.reason
        assert shown.count(f"data: {entry.name}: ") == 1
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    order, planted = SampleOrder(40, seed=3), {entry.sample for entry in listed}
    drawn = [sample for epoch in range(EPOCHS) for sample in order.samples(epoch, np.arange(32)).tolist()]
    assert sum(r.get("bad_samples", 0) for r in records) == sum(sample in planted for sample in drawn) > EPOCHS


def test_too_many_bad_files_stop_all_ranks_at_the_same_step(few: Path, tmp_path: Path) -> None:
    plant(few)
    recipe, run = write_recipe(tmp_path, few, tmp_path / "run"), tmp_path / "run"
    processes = start_ranks(command(recipe, "data.max_bad_share=0.002"), 2)
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "samples could not be used, more than data.max_bad_share 0.002, for example " in errors[0]
    steps = [r["step"] for r in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < STEPS
    assert read_quarantine(run / "quarantine.jsonl")
