"""One run that meets every fault, one after the other, ends like one that met none."""

import random
import shutil
from pathlib import Path

import pytest

from lut_ds.engine.manifest import step_folders, verify
from tests.faults import injections
from tests.faults.namespaces import mounting_works
from tests.faults.victim import SAVE_EVERY, Victim, undisturbed

pytestmark = pytest.mark.slow
mounts = pytest.mark.skipif(not mounting_works(), reason="needs a mount namespace: root, or user namespaces")


@pytest.fixture(scope="module")
def victim(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Victim:
    """The run under attack: each test continues it from where the one before left it."""
    folder = tmp_path_factory.mktemp("faults")
    victim = Victim(folder / "victim", Path(shutil.copytree(digits, folder / "data")))
    victim.go(6 * SAVE_EVERY)
    return victim


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "shared.safetensors", "state.json", "manifest.json"])
def test_any_damage_to_a_checkpoint_is_found(victim: Victim, tmp_path: Path, name: str) -> None:
    """A flipped bit of the manifest may hit what means nothing, such as a space: then it is still the same checkpoint."""
    newest, rng = step_folders(victim.checkpoints)[0], random.Random(random.randrange(10**6))
    copy = Path(shutil.copytree(newest, tmp_path / newest.name))
    for spoil in [*[injections.flip] * 100, *[injections.truncate] * 20]:
        spoil(copy / name, rng)
        assert verify(copy) is not None or (name == "manifest.json" and spoil is injections.flip)
        shutil.copyfile(newest / name, copy / name)
        assert verify(copy) is None


@mounts
@pytest.mark.parametrize("when", ["before a save", "as a save begins", "before metrics are written"])
def test_disk_full(victim: Victim, when: str) -> None:
    injections.disk_full(when)(victim)


@mounts
def test_run_folder_read_only(victim: Victim) -> None:
    injections.read_only(victim)


def test_data_folder_away(victim: Victim) -> None:
    injections.data_away(1.0)(victim)


def test_clock_jumps(victim: Victim) -> None:
    injections.clock_jumps(victim)


def test_signals_in_a_save(victim: Victim) -> None:
    injections.signals_in_a_save(victim)


def test_files_lost(victim: Victim) -> None:
    injections.lost_files(victim)


def test_newest_checkpoints_damaged(victim: Victim) -> None:
    injections.damaged_checkpoints(victim)


def test_after_all_that_the_run_is_the_undisturbed_one(victim: Victim, digits: Path, tmp_path: Path) -> None:
    assert victim.damaged() == []
    assert victim.leftovers() == []
    assert victim.deviation(undisturbed(tmp_path, digits, 1, victim.last_step())) is None
