"""Runs whose ranks are killed again and again end as if nothing had happened."""

import os
import random
from pathlib import Path

import pytest

from tests.faults.kills import kill_often


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_the_undisturbed_one(digits: Path, tmp_path: Path) -> None:
    found = kill_often(tmp_path, digits, ranks=1, resumes=3, seed=random.randrange(10**6))
    assert found["resumes"] >= 3


@pytest.mark.slow
@pytest.mark.skipif("LUT_LONG" not in os.environ, reason="a quarter of an hour; LUT_LONG=1 runs it")
@pytest.mark.parametrize("ranks, resumes", [(1, 65), (2, 35)])
def test_a_hundred_kills(digits: Path, tmp_path: Path, ranks: int, resumes: int) -> None:
    found = kill_often(tmp_path, digits, ranks, resumes, seed=random.randrange(10**6))
    assert found["resumes"] >= resumes
    assert found["kills_that_left_an_unfinished_save"] > 0  # or no kill came in the middle of one
