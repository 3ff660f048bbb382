"""torch.compile of the blocks changes speed, not what is learned, with and without sharded weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.launching import run_ranks
from tests.engine.tiny import tiny_tree

pytestmark = pytest.mark.slow


def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    trees = {}
    for stage in ("zero1", "zero3"):
        for compiled in (False, True):
            trees[f"{stage}_{compiled}"] = tiny_tree(deepspeed=stage, micro_batch=8)
            trees[f"{stage}_{compiled}"]["train"]["compile"] = compiled
    (tmp_path / "cases.json").write_text(json.dumps(trees))
    run_ranks([sys.executable, "-m", "tests.engine.zero_worker", str(tmp_path / "cases.json"), str(tmp_path)], 1)
    for stage in ("zero1", "zero3"):
        eager, compiled = (load_file(tmp_path / f"{stage}_{flag}.safetensors")["metrics"] for flag in (False, True))
        torch.testing.assert_close(compiled[:, 0], eager[:, 0], rtol=1e-5, atol=0)
        torch.testing.assert_close(compiled[:10, -3], eager[:10, -3], rtol=1e-3, atol=0)
