"""Fixtures of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.engine.checkpoint.store import Run


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone; the store's methods are collective."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(one_rank: None, tmp_path: Path) -> Run:
    """A store in an empty folder."""
    return Run(tmp_path)
