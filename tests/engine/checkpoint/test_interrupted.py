"""Saves that are killed, or find no space: what was saved before is whole, and nothing half written counts."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lut_ds.engine.manifest import step_name
from tests.engine.checkpoint.store import Run
from tests.engine.launching import PATIENCE, ROOT


def test_leftovers_of_a_killed_save_are_removed_and_not_taken(run: Run) -> None:
    run.save(1)
    partial = run.folder / f".{step_name(2)}.partial"
    shutil.copytree(run.folder / step_name(1), partial)
    (partial / "manifest.json").unlink()
    again = Run(run.folder.parent)
    assert not partial.exists()
    assert again.newest() == step_name(1)


KILLED = """
import os, random, signal, sys, time
import torch, torch.distributed as dist
from pathlib import Path
from lut_ds.engine.checkpoint import CheckpointStore
from lut_ds.engine.manifest import verify

folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
draw = random.Random(seed)

def train(start):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    store = CheckpointStore(folder, 0, 1, 2, None, print)
    found = store.newest_valid()
    step = int(found.name.removeprefix("step_")) if found else 0
    if step != start:
        os._exit(3)
    os.write(ready, b"x")
    while True:
        os.write(ready, b"s")
        step += 1
        store.save(step, {"w": torch.full((200_000,), float(step))}, {}, {"b": torch.zeros(9)}, {})

newest, moved, seconds = 0, 0, 0.05
for number in range(kills):
    listen, ready = os.pipe()
    child = os.fork()
    if child == 0:
        train(newest)
    assert os.read(listen, 1) == b"x", "the run did not find the newest valid checkpoint"
    os.read(listen, 1)
    for _ in range(number % 3):  # whole saves, then a part of one
        begun = time.monotonic()
        os.read(listen, 1)
        seconds = time.monotonic() - begun
    time.sleep(draw.uniform(0, seconds))
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(listen), os.close(ready)
    steps = sorted(p for p in folder.glob("step_*"))
    damaged = [f"{p.name}: {verify(p)}" for p in steps if verify(p)]
    assert not damaged, damaged
    before, newest = newest, max([int(p.name[5:]) for p in steps], default=0)
    assert newest >= before, "a checkpoint was lost"
    moved += newest > before
    if (folder / "latest").exists():
        assert (folder / (folder / "latest").read_text().strip()).is_dir() or newest > before
print(moved)
"""


def kill_saves(folder: Path, kills: int) -> int:
    """Kill a run that does nothing but save, at random instants; every folder must be valid, and none be lost."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder / "checkpoints"), str(kills), str(random.randrange(10**6))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def test_killed_while_saving(tmp_path: Path) -> None:
    assert kill_saves(tmp_path, 12) > 2


@pytest.mark.slow
def test_killed_while_saving_a_hundred_times(tmp_path: Path) -> None:
    assert kill_saves(tmp_path, 100) > 20


FULL = """
import resource, sys
import torch, torch.distributed as dist
from pathlib import Path
from lut_ds.engine.checkpoint import CheckpointStore
from lut_ds.engine.manifest import verify
from lut_ds.errors import RunFault

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
store = CheckpointStore(folder, 0, 1, 2, None, print)
store.save(1, {"w": torch.zeros(10_000)}, {}, {}, {})
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for step, size in ((2, 10_000_000), (3, 10_000)):
    try:
        store.save(step, {"w": torch.zeros(size)}, {}, {}, {})
        print("saved", step)
    except RunFault as fault:
        print("fault", fault)
print(sorted(p.name for p in folder.iterdir()), verify(store.newest_valid()))
# A worker of gloo that outlives the interpreter aborts the process, seldom, and after all is done.
dist.barrier()
dist.destroy_process_group()
"""


def save_without_space(folder: Path, limit: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(folder), str(limit)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def expect_one_fault(lines: list[str], reason: str) -> None:
    """The one that did not fit is a fault and leaves nothing; the ones before and after it are whole."""
    assert lines[0].startswith("fault checkpoint of step 2 not written"), lines
    assert reason in lines[0]
    assert "earlier checkpoints are intact" in lines[0]
    assert lines[1:] == ["saved 3", f"['latest', '{step_name(1)}', '{step_name(3)}'] None"]


def test_no_space_left(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        expect_one_fault(save_without_space(tmp_path / "checkpoints", 0), "disk full")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    expect_one_fault(save_without_space(tmp_path / "checkpoints", 1_000_000), "too large")
