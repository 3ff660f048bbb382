"""Checkpoints whose files were cut, flipped, removed or forged: named, passed over, and never executed."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lut_ds.engine.manifest import step_name, verify
from lut_ds.errors import UserError
from tests.engine.checkpoint.store import FILES, Run


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_damage(run: Run) -> None:
    run.save(1, 2)
    (run.folder / step_name(2) / FILES[0]).chmod(0)
    assert run.newest() == step_name(1)
