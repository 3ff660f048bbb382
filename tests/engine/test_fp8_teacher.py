"""Runs with an fp8 teacher: resumed to the bit, taken up by another precision, refused where it cannot run."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lut_ds.config import load_recipe, parse_recipe
from lut_ds.engine.build import build_student, build_teacher, check_fp8
from lut_ds.engine.memory import sizes
from lut_ds.errors import UserError
from lut_ds.method.fp8 import Fp8Linear
from lut_ds.tracking import read_metrics
from tests.engine.launching import run_ranks
from tests.engine.tiny import tiny_tree


def run(folder: Path, digits: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train the tiny model on the digits in `folder`, or go on; losses and norms of all its steps."""
    tree = tiny_tree(deepspeed="zero1")
    tree["data"] = {"path": str(digits), "threads": 1}
    tree["precision"]["teacher"] = "fp8"
    tree["run"] = {"dir": str(folder), "log_every": 2, "seed": 3}
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(tree))
    run_ranks([sys.executable, "-m", "lut_ds", "pretrain", str(recipe), *overrides, "--json"], 1)
    return [
        {key: r[key] for key in ("step", "loss", "bc", "grad_norm")} for r in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_resumes_to_the_bit_and_in_another_precision(digits: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", digits, "train.max_steps=8")
    parts = tmp_path / "parts"
    assert run(parts, digits, "train.max_steps=4") == whole[:4]
    stored = load_file(parts / "checkpoints" / "step_00000004" / "rank_00000.safetensors")
    averages = [tensor for name, tensor in stored.items() if name.startswith("ema")]
    assert averages
    assert all(tensor.dtype == torch.float32 for tensor in averages)  # the average is fp32; no fp8 tensor is stored
    assert run(parts, digits, "train.max_steps=8") == whole
    # The teacher's precision is free to change: what it is made of is in the checkpoint.
    other = run(parts, digits, "train.max_steps=10", "precision.teacher=bf16")
    assert [r["step"] for r in other] == list(range(1, 11))


def test_only_the_blocks_products_are_fp8() -> None:
    recipe = load_recipe("lut_vits16", ["model.depth=2", "precision.teacher=fp8"])
    teacher = build_teacher(recipe, build_student(recipe), torch.device("cpu"))
    assert teacher is not None
    fp8 = {name for name, layer in teacher.named_modules() if isinstance(layer, Fp8Linear)}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert fp8 == {f"encoder.blocks.{block}.{layer}" for block in range(2) for layer in layers}
    weights = [p for p in teacher.parameters() if p.dtype == torch.float8_e4m3fn]
    assert sum(w.numel() for w in weights) == sizes(recipe).products
    assert {p.dtype for p in teacher.parameters()} == {torch.float8_e4m3fn, torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.parameters())


def test_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny_tree()
    tree["precision"] = {"compute": "bf16", "teacher": "fp8"}
    recipe = parse_recipe(tree, "tiny")
    check_fp8(recipe, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(
        UserError, match=r"compute capability 8\.9 .* found NVIDIA A100.* 8\.0; use precision\.teacher=bf16"
    ):
        check_fp8(recipe, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_fp8(recipe, torch.device("cuda", 0))
    tree["model"] |= {"width": 40, "heads": 2}
    with pytest.raises(UserError, match="divisible by 16, found 40 and 160"):
        parse_recipe(tree, "tiny")
