"""Starts the interpreter tests in processes of their own: Triton reads TRITON_INTERPRET once, when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = "tests/kernels/interpreter"


def run_interpreted(*arguments: str, **variables: str) -> None:
    """Run pytest with the kernels interpreted; show its output where it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "LUT_KERNELS"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **variables}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::DeprecationWarning",
        *arguments,
    ]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " passed" in found.stdout


def test_kernels_equal_the_reference() -> None:
    run_interpreted(FOLDER, "-m", "not slow")


@pytest.mark.slow
def test_kernels_equal_the_reference_on_large_grids() -> None:
    run_interpreted(FOLDER, "-m", "slow")


@pytest.mark.slow
def test_golden_training_steps_through_the_kernels() -> None:
    run_interpreted("tests/method/test_golden_lut.py", "tests/method/test_golden_mae.py", LUT_KERNELS="triton")
