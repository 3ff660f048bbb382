"""In every ZeRO stage: bad steps move nothing on any rank, and ranks that differ by one bit are found."""

import json
import sys
from pathlib import Path

import pytest

from tests.engine.guards.stages_worker import BAD_STEP, SPIKE_STEP
from tests.engine.launching import run_ranks
from tests.engine.tiny import tiny_tree

CASES = ["fp32_zero0", "fp32_zero1", "fp32_zero2", "fp32_zero3", "bf16_zero1", "bf16_zero2", "bf16_zero3"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks saw."""
    folder: Path = tmp_path_factory.mktemp("guard")
    trees = {}
    for name in CASES:
        compute, stage = name.split("_")
        trees[name] = tiny_tree(deepspeed=stage)
        trees[name]["guard"] = {"spike": "skip", "spike_window": 8}
        trees[name]["precision"] = {"compute": compute, "teacher": compute}
    (folder / "cases.json").write_text(json.dumps(trees))
    run_ranks(
        [sys.executable, "-m", "tests.engine.guards.stages_worker", str(folder / "cases.json"), str(folder / "out")], 2
    )
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_bad_step_moves_nothing_on_any_rank(guarded: list[dict], case: str) -> None:
    for results in guarded:
        for step, seen in enumerate(results[case]["steps"]):
            assert seen["finite"], (step, seen)
            if step in (BAD_STEP, SPIKE_STEP):
                assert seen["applied"] == 0
                assert seen["moved"] == []
            else:
                assert seen["applied"] == 1
                assert {"masters", "moments", "ema", "ema buffers", "batch norm", "teacher"} == set(seen["moved"])


@pytest.mark.parametrize("case", CASES)
def test_one_flipped_bit_on_one_rank_is_found_by_all(guarded: list[dict], case: str) -> None:
    for results in guarded:
        assert results[case]["healthy"] is None
        found = results[case]["flipped"]
        assert "ranks hold different models" in found
        owner = "teacher" if case.endswith("zero3") else "student"
        assert f"the first tensor that differs is {owner}.encoder.blocks.0." in found
