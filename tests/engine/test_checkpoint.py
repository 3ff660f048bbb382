"""The checkpoint store against everything that happens to files: cut, flipped, removed, forged, killed, no space."""

import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lut_ds.engine.checkpoint import CheckpointStore
from lut_ds.engine.files import write_text_atomically
from lut_ds.engine.manifest import step_name, verify
from lut_ds.engine.state import ShardReader
from lut_ds.errors import RunFault, UserError
from tests.engine.launching import PATIENCE, ROOT, start_ranks

FILES = ["rank_00000.safetensors", "shared.safetensors", "state.json", "manifest.json"]


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone; the store's methods are collective."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """A store in a folder, with what it reports."""

    def __init__(self, folder: Path, keep_last: int = 100, keep_every: int | None = None) -> None:
        self.folder, self.said = folder / "checkpoints", []
        self.store = CheckpointStore(self.folder, 0, 1, keep_last, keep_every, self.said.append)

    def save(self, *steps: int) -> Path:
        for step in steps:
            layout = {"fragments": [], "shapes": {}, "stage": 1}
            own = {"master.0": torch.full((64,), float(step)), "step.0": torch.tensor([float(step)])}
            shared = {"student.norm": torch.arange(4.0)}
            path = self.store.save(step, own, {"layout": json.dumps(layout)}, shared, {"epoch": step / 4})
        return path

    def newest(self) -> str | None:
        path = self.store.newest_valid()
        return None if path is None else path.name

    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in self.store.candidates())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


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


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def grow(file: Path) -> None:
    with file.open("ab") as end:
        end.write(b"\0")


def remove(file: Path) -> None:
    file.unlink()


def become_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def become_dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, empty, flip, grow, remove, become_a_folder, become_dangling])
def test_a_damaged_checkpoint_is_passed_over_and_named(run: Run, name: str, damage: Callable[[Path], None]) -> None:
    run.save(1, 2)
    damage(run.folder / step_name(2) / name)
    if name == "manifest.json" and damage in (grow, flip):
        return  # see the test of manifests: not every change of JSON text is damage
    assert run.newest() == step_name(1)
    assert len(run.said) == 1
    assert step_name(2) in run.said[0]
    assert name in run.said[0]
    assert (run.folder / step_name(2)).is_dir()  # passed over, not thrown away


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(name=st.sampled_from(FILES[:-1]), position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(run: Run, name: str, position: int, bit: int) -> None:
    file = run.save(1) / name
    data = bytearray(file.read_bytes())
    data[position % len(data)] ^= 1 << bit
    file.write_bytes(data)
    assert verify(run.folder / step_name(1)) == f"{name}: content does not match its SHA-256"


MANIFESTS: list[Any] = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"3",
    {},
    {"format": 2, "files": {}},
    {"format": 1},
    {"format": 1, "files": []},
    {"format": 1, "files": None},
    {"format": 1, "step": 2, "world_size": 1, "files": {}},
    {"format": 1, "step": 2, "world_size": 1, "files": {"state.json": 3}},
    {"format": 1, "step": 2, "world_size": 1, "files": {"state.json": {}}},
    {"format": 1, "step": 2, "world_size": 1, "files": {"state.json": {"size": "x", "sha256": 3}}},
]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_a_manifest_that_is_none_is_damage(run: Run, manifest: Any) -> None:
    run.save(1, 2)
    content = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (run.folder / step_name(2) / "manifest.json").write_bytes(content)
    assert run.newest() == step_name(1)
    assert step_name(2) in run.said[0]


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_manifest_must_name_every_file(run: Run, name: str) -> None:
    run.save(1, 2)
    path = run.folder / step_name(2) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][name]
    path.write_text(json.dumps(manifest))
    assert run.newest() == step_name(1)


def test_a_manifest_cannot_point_elsewhere(run: Run, tmp_path: Path) -> None:
    run.save(1, 2)
    path = run.folder / step_name(2) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../step_00000001/state.json"] = manifest["files"]["state.json"]
    path.write_text(json.dumps(manifest))
    assert run.newest() == step_name(1)


def test_several_damaged_ones_are_all_named(run: Run) -> None:
    run.save(1, 2, 3)
    for step in (2, 3):
        flip(run.folder / step_name(step) / FILES[0])
    assert run.newest() == step_name(1)
    assert [line.split()[1] for line in run.said] == [step_name(3), step_name(2)]
    flip(run.folder / step_name(1) / FILES[0])
    with pytest.raises(UserError, match=r"all 3 checkpoints are damaged, the newest is step_00000003"):
        run.newest()  # starting over would write over what may still be repaired


def test_a_damaged_one_is_written_anew(run: Run) -> None:
    run.save(1, 2)
    flip(run.folder / step_name(2) / FILES[0])
    run.save(2)
    assert run.newest() == step_name(2)
    assert run.said == []


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


TWO = """
import os, sys
import torch, torch.distributed as dist
from pathlib import Path
from lut_ds.engine.checkpoint import CheckpointStore
from lut_ds.errors import RunFault, UserError

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
dist.init_process_group("gloo")
store = CheckpointStore(folder, rank, 2, 3, None, lambda line: print("said", line))
own = {"w": torch.full((10,), float(rank))}
store.save(1, own, {}, {}, {})
try:
    if rank == 1:  # a folder where this rank's file goes: its write fails, the other's does not
        import lut_ds.engine.checkpoint as module
        write_tensors = module.write_tensors
        module.write_tensors = lambda path, *rest: (path.mkdir(), write_tensors(path, *rest))
    store.save(2, own, {}, {}, {})
except RunFault as fault:
    print("fault", fault)
if rank == 0:
    with open(folder / "step_00000001" / "rank_00001.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
dist.barrier()
try:
    store.newest_valid()
except UserError as error:
    print("newest", error)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_fail_and_judge_together(tmp_path: Path) -> None:
    """One rank's failure is every rank's; a file that only the other rank has checked counts for both."""
    processes = start_ranks([sys.executable, "-c", TWO, str(tmp_path / "c")], 2)
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for out, _ in outputs:
        assert "fault checkpoint of step 2 not written" in out
        assert "rank 1: " in out
        assert "all 1 checkpoints are damaged" in out
    assert "said checkpoint step_00000001 is damaged" in outputs[0][0]
    assert "said" not in outputs[1][0]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["latest", "step_00000001"]


APART = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from lut_ds.engine.sharedfolder import check_shared
from lut_ds.errors import UserError
dist.init_process_group("gloo")
for folder in sys.argv[1:]:
    try:
        check_shared(Path(folder), int(os.environ["RANK"]), 2, 2.0)
        print("shared", os.listdir(folder))
    except UserError as error:
        print("refused", error)
    dist.barrier()
dist.destroy_process_group()
"""
# Rank 1 gets an empty file system in place of the first folder, as on a node that lacks the share, and a read-only one of the second.
MOUNTED = """
python=$1; shift
[ $RANK = 0 ] || [ -n "$INSIDE" ] || exec unshare -rm env INSIDE=1 sh -ec "$0" "$0" "$python" "$@"
[ $RANK = 0 ] || { mount -t tmpfs none "$2"; mount -t tmpfs -o ro none "$3"; }
exec "$python" -c "$@"
"""


@pytest.mark.slow
def test_a_rank_that_has_another_folder_or_may_not_write_is_named(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    folders = [str(tmp_path / name) for name in ("hidden", "readonly", "shared")]
    for folder in folders:
        Path(folder).mkdir()
    processes = start_ranks(["sh", "-ec", MOUNTED, MOUNTED, sys.executable, APART, *folders], 2)
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for out, _ in outputs:
        hidden, readonly, shared = out.splitlines()
        assert hidden.startswith(f"refused run.dir: {folders[0]}: what rank 1 wrote is not seen on ")
        assert readonly.startswith(f"refused run.dir: {folders[1]}: rank 1 on ")
        assert "cannot write it: Read-only file system; name another folder" in readonly
        assert shared.startswith("shared")
    assert not os.listdir(folders[2])


class Malicious:
    """Unpickling this creates the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("dump", ["pickle", "torch.save"])
def test_a_pickle_named_like_our_files_is_never_executed(run: Run, tmp_path: Path, name: str, dump: str) -> None:
    """Also when whoever put it there made size and hash right."""
    sign = tmp_path / "executed"
    path = run.save(1)
    path = run.save(2)
    with (path / name).open("wb") as file:
        pickle.dump(Malicious(sign), file) if dump == "pickle" else torch.save(Malicious(sign), file)
    with (path / name).open("rb") as file:  # the trap works
        pickle.load(file) if dump == "pickle" else torch.load(file, weights_only=False)  # noqa: S301
    assert sign.exists()
    sign.unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / name).read_bytes()
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert run.newest() == step_name(1)
    assert name in run.said[0]
    assert not sign.exists()


def test_a_layout_that_does_not_cover_a_parameter_is_a_fault(run: Run) -> None:
    reader = ShardReader(run.save(1))
    assert reader.scalar("step") == 1.0
    with pytest.raises(RunFault, match="expected 4 values from 0, found 0"):
        reader.read("master", "encoder.norm.weight", 0, 4)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_damage(run: Run) -> None:
    run.save(1, 2)
    (run.folder / step_name(2) / FILES[0]).chmod(0)
    assert run.newest() == step_name(1)


def test_a_stop_signal_during_a_save_does_not_break_it(tmp_path: Path) -> None:
    """`listen` only remembers the signal: the save in progress ends as usual."""
    from lut_ds.engine.signals import listen

    run = Run(tmp_path)
    with listen(["SIGUSR1"]) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        run.save(1)
        assert stop.signal_name == "SIGUSR1"
    assert run.newest() == step_name(1)
