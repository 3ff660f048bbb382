"""Fixtures of this folder."""

from pathlib import Path

import pytest

from tests.engine.checkpoint.store import Run


@pytest.fixture
def run(one_rank: None, tmp_path: Path) -> Run:
    """A store in an empty folder."""
    return Run(tmp_path)
