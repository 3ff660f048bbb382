"""Saves beside the steps, faults of the disk under them, and checkpoints that belong to another run."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lut_ds.config import load_recipe
from lut_ds.engine import files
from lut_ds.engine.checkpoint import CheckpointStore
from lut_ds.engine.launch import Ranks
from lut_ds.engine.manifest import step_name, verify
from lut_ds.engine.runfolder import tracker_id
from lut_ds.engine.saving import Saver
from lut_ds.errors import RunFault, UserError
from lut_ds.tracking import EventLog

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", 0, 1, 1, None, print)


def begin(store: CheckpointStore, step: int) -> None:
    store.start(step, {"w": torch.full((1000,), float(step))}, {}, {}, {"epoch": 1.0})


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if not path.name.startswith("."))


def test_a_save_counts_only_when_it_is_whole(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk takes its time the steps go on, and the old checkpoint is the newest."""
    store.save(1, {"w": torch.zeros(3)}, {}, {}, {})
    disk, synced = threading.Event(), os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda handle: (disk.wait(600), synced(handle)))
    begin(store, 2)
    assert store.in_flight
    assert store.busy
    assert names(store) == ["latest", step_name(1)]
    disk.set()
    saved = store.finish()
    assert saved is not None
    assert (saved.step, saved.size, store.busy, store.in_flight) == (2, sum_of_files(saved.path), False, False)
    assert names(store) == ["latest", step_name(2)]  # keep_last is 1: the old one went after the new one came
    assert verify(saved.path) is None


def sum_of_files(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")


def failing(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
    """Let the disk refuse the next writes."""
    left, synced = [times], os.fsync

    def fsync(handle: int) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        synced(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_what_a_file_server_refuses_once_is_tried_again(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(monkeypatch, number, 1)
    begin(store, 1)
    saved = store.finish()
    assert saved is not None
    assert verify(saved.path) is None


@pytest.mark.parametrize("number, times", [(errno.EIO, 2), (errno.ENOSPC, 1), (errno.EDQUOT, 1)])
def test_what_it_refuses_twice_or_for_good_is_a_fault_at_the_next_agreement(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, number: int, times: int
) -> None:
    store.save(1, {"w": torch.zeros(3)}, {}, {}, {})
    failing(monkeypatch, number, times)
    begin(store, 2)
    with pytest.raises(RunFault, match=r"step 2 not written .* earlier checkpoints are intact"):
        store.finish()
    assert names(store) == ["latest", step_name(1)]
    assert store.newest_valid() == store.folder / step_name(1)
    begin(store, 3)  # and the next one is none the worse
    assert store.finish() is not None


def test_bytes_that_come_back_different_are_never_published(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = files.describe_file
    monkeypatch.setattr(files, "describe_file", lambda path: {**described(path), "sha256": "0" * 64})
    begin(store, 1)
    with pytest.raises(RunFault, match="reads back differently"):
        store.finish()
    assert names(store) == []


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("demo")

    def saver(*overrides: str) -> Saver:
        here = load_recipe("demo", overrides)
        return Saver(here, Ranks(0, 1, 0, torch.device("cpu"), "none"), tmp_path, 4, print, EventLog(tmp_path / "e"))

    def put(step: int, state: dict[str, Any]) -> None:
        store = CheckpointStore(tmp_path / "checkpoints", 0, 1, 9, None, print)
        store.save(step, {"w": torch.zeros(3)}, {}, {}, {"epoch": step / 4, **state})

    put(4, {"recipe": recipe.model_dump(mode="json")})
    found = saver("train.micro_batch=8", "run.log_every=3").find()
    assert found is not None
    assert found[1]["step"] == 4
    with pytest.raises(
        UserError, match=r"step_00000004: written by another recipe: optim\.weight_decay is 0\.05 there"
    ):
        saver("optim.weight_decay=0.1").find()
    with pytest.raises(UserError, match=r"run\.seed is 0 there and 7 here"):
        saver("run.seed=7").find()
    put(8, {})
    with pytest.raises(UserError, match="expected a recipe in it, found none"):
        saver().find()


def test_a_lost_tracker_id_comes_back_from_the_checkpoint(tmp_path: Path) -> None:
    """The same wandb run goes on when only the checkpoints of a run folder were kept."""
    recipe, ranks = load_recipe("demo"), Ranks(0, 1, 0, torch.device("cpu"), "none")
    saver = Saver(recipe, ranks, tmp_path, 4, print, EventLog(tmp_path / "e"))
    known = tracker_id(tmp_path)
    CheckpointStore(tmp_path / "checkpoints", 0, 1, 9, None, print).save(
        4, {"w": torch.zeros(3)}, {}, {}, saver._content(4)
    )
    (tmp_path / "tracker_id").unlink()
    found = saver.find()
    assert found is not None
    saver.report_resume(*found)
    assert (tmp_path / "tracker_id").read_text() == known + "\n"
    assert tracker_id(tmp_path) == known
