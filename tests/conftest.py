"""Fixtures that every room may use, and what keeps the suite's outcome from depending on speed, order and luck."""

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

# Before torch starts its threads: several workers and ranks share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, register_random, settings
from torch import Tensor

from lut_ds.data.digits import write_digits

# The tests are no ranks of the job in which somebody may start them.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_", "SLURM_", "TORCHELASTIC_")
for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
    del os.environ[name]

# Above Hypothesis's own profile, which draws the same examples each time where CI is set and others each time elsewhere:
# how long an example takes says how busy the machine is.
settings.register_profile("lut_ds", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lut_ds")


class TorchGenerator:
    """torch's default generator as Hypothesis sets it before each example, so that a failing one fails again."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> Tensor:
        return torch.get_rng_state()

    def setstate(self, state: Tensor) -> None:
        torch.set_rng_state(state)


TORCH = TorchGenerator()  # Hypothesis keeps a weak reference
register_random(TORCH)


# Files that take a minute or more, longest first: begun last, they would leave the other workers without work at the end.
LONG = (
    "kernels/test_interpreted.py",
    "launch/test_slurm.py",
    "engine/test_resume.py",
    "engine/guards/test_sick_ranks.py",
    "faults/test_injections.py",
    "engine/test_zero_parity.py",
    "engine/test_compile.py",
    "engine/test_recipes.py",
    "demo/test_demo.py",
    "bench/test_step_bench.py",
    "engine/test_stopping.py",
    "engine/checkpoint/test_interrupted.py",
    "sweep/test_sweep.py",
    "faults/test_kills.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files; within a file, and among the others, the order stays."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's handwritten digits as a JPEG image folder, 32 px, with train and val."""
    return write_digits(tmp_path_factory.mktemp("digits") / "digits", 32)


def _restore_environment(before: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in before and name != "PYTEST_CURRENT_TEST"]:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@pytest.fixture(scope="module", autouse=True)
def file_environment() -> Iterator[None]:
    """Commands that run in the test's process set variables of it; what a file's fixtures set ends with the file."""
    before = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    yield
    _restore_environment(before)


@pytest.fixture(autouse=True)
def environment(file_environment: None) -> Iterator[None]:
    """What a test sets, or a command in it, the next test does not inherit."""
    before = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    yield
    _restore_environment(before)


@pytest.fixture(autouse=True)
def seeds(request: pytest.FixtureRequest) -> None:
    """torch draws the same numbers whatever ran before in this process; Python's generator does so where CI is set."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    random.seed(seed if "CI" in os.environ else None)
