"""Fixtures that every room may use."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch starts its threads: several workers and ranks share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from lut_ds.data.digits import write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's handwritten digits as a JPEG image folder, 32 px, with train and val."""
    return write_digits(tmp_path_factory.mktemp("digits") / "digits", 32)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Commands that run in the test's process set variables of it; the next test must not inherit them."""
    before = dict(os.environ)
    yield
    for name in [name for name in os.environ if name not in before]:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
