"""The checkpoint store when nothing goes wrong: what it writes, keeps, and says is the newest."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lut_ds.engine.files import write_text_atomically
from lut_ds.engine.manifest import step_name, verify
from lut_ds.engine.signals import listen
from lut_ds.engine.state import ShardReader
from lut_ds.errors import RunFault
from tests.engine.checkpoint.store import FILES, Run
from tests.engine.launching import PATIENCE

pytestmark = pytest.mark.usefixtures("one_rank")


def test_what_was_saved_is_read_back(run: Run) -> None:
    path = run.save(20)
    assert path == run.folder / "step_00000020"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    with safe_open(path / "rank_00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("master.0"), torch.full((64,), 20.0))
    assert json.loads((path / "state.json").read_text()) == {"step": 20, "epoch": 5.0}
    assert (run.folder / "latest").read_text() == "step_00000020\n"
    assert verify(path) is None
    assert run.newest() == "step_00000020"
    assert run.said == []


def test_the_manifest_is_the_truth_about_the_files(run: Run) -> None:
    path = run.save(1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (1, 1)
    for name in FILES[:-1]:
        data = (path / name).read_bytes()
        assert manifest["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_an_empty_folder_has_no_checkpoint(run: Run) -> None:
    assert run.newest() is None


def test_strangers_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=1)
    run.save(1)
    shutil.copytree(run.folder / step_name(1), run.folder / "step_00000001.backup")
    (run.folder / "step_notes").mkdir()
    (run.folder / "step_00000009.txt").write_text("x")
    run.save(2)
    assert run.newest() == step_name(2)
    assert (run.folder / "step_00000001.backup").is_dir()
    assert (run.folder / "step_notes").is_dir()
    assert not (run.folder / step_name(1)).exists()


@pytest.mark.parametrize(
    "keep_last, keep_every, kept",
    [
        (1, None, [10]),
        (3, None, [8, 9, 10]),
        (2, 4, [4, 8, 9, 10]),
        (1, 5, [5, 10]),
        (100, None, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_retention(tmp_path: Path, keep_last: int, keep_every: int | None, kept: list[int]) -> None:
    run = Run(tmp_path, keep_last, keep_every)
    run.save(*range(1, 11))
    assert run.steps() == kept


def test_retention_counts_only_what_is_behind(tmp_path: Path) -> None:
    """After going back to step 2 the later ones are another future's; the ones behind are what a rewind needs."""
    run = Run(tmp_path, keep_last=2)
    run.save(1, 2)
    for step in (8, 9):
        shutil.copytree(run.folder / step_name(1), run.folder / step_name(step))
    run.save(3)
    assert run.steps() == [2, 3, 8, 9]


READER = """
import json, sys
seen, last, changes = set(), None, 0
while changes < 100:
    length = len(open(sys.argv[1]).read())
    seen.add(length)
    changes += length != last
    last = length
print(json.dumps(sorted(seen)))
"""


def test_latest_is_never_half_written(tmp_path: Path) -> None:
    """A reader in another process sees one of the texts, whole, at every moment."""
    path = tmp_path / "latest"
    texts = ["a" * 4000, "b" * 9000]
    write_text_atomically(path, texts[0])
    reader = subprocess.Popen([sys.executable, "-c", READER, path], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    for text in itertools.cycle(texts):
        write_text_atomically(path, text)
        if reader.poll() is not None:
            break
        assert time.monotonic() < deadline, "the reader has not seen the text change often enough"
    assert json.loads(reader.communicate()[0]) == [4000, 9000]
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_a_layout_that_does_not_cover_a_parameter_is_a_fault(run: Run) -> None:
    reader = ShardReader(run.save(1))
    assert reader.scalar("step") == 1.0
    with pytest.raises(RunFault, match="expected 4 values from 0, found 0"):
        reader.read("master", "encoder.norm.weight", 0, 4)


def test_a_stop_signal_during_a_save_does_not_break_it(tmp_path: Path) -> None:
    """`listen` only remembers the signal: the save in progress ends as usual."""
    run = Run(tmp_path)
    with listen(["SIGUSR1"]) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        run.save(1)
        assert stop.signal_name == "SIGUSR1"
    assert run.newest() == step_name(1)
