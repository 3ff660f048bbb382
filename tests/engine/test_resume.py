"""Runs that are killed, stopped or resized continue as if nothing had happened."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lut_ds.tracking import read_metrics
from tests.engine.launching import ROOT, run_ranks, start_ranks
from tests.engine.tiny import tiny_tree

STEPS = 14
VOLATILE = ("images_per_s", "data_wait")


def write_recipe(folder: Path, digits: Path, run: Path, **train: Any) -> Path:
    """A recipe of a few steps on the digits, a checkpoint every 4 steps, metrics every 2."""
    tree = tiny_tree(global_batch=16, max_steps=STEPS, **train)
    tree["data"] = {"path": str(digits), "threads": 1}
    tree["run"] = {"dir": str(run), "log_every": 2, "save_every": 4, "seed": 3}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(recipe: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "lut_ds", "pretrain", str(recipe), *overrides, "--json"]


def curve(run: Path) -> list[dict[str, Any]]:
    """Every step's record without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in VOLATILE} for r in read_metrics(run / "metrics.jsonl")]


def wait_for_records(run: Path, count: int, processes: list[subprocess.Popen[str]], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while len(read_metrics(run / "metrics.jsonl")) < count:
        assert time.monotonic() < deadline, "no progress"
        assert all(p.poll() is None for p in processes), (
            "a rank ended by itself: " + processes[0].communicate()[1][-2000:]
        )
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Curves of runs that nothing interrupted, by DeepSpeed configuration; 2 ranks."""
    curves = {}
    for zero in ("zero1", "zero2"):
        folder = tmp_path_factory.mktemp(zero)
        run_ranks(command(write_recipe(folder, digits, folder / "run", deepspeed=zero)), 2)
        curves[zero] = curve(folder / "run")
        assert [r["step"] for r in curves[zero]] == list(range(1, STEPS + 1))
    return curves


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_kill_at_a_random_step_continues_bit_identically(
    undisturbed: dict[str, list[dict[str, Any]]], digits: Path, tmp_path: Path, zero: str
) -> None:
    recipe, run = write_recipe(tmp_path, digits, tmp_path / "run", deepspeed=zero), tmp_path / "run"
    processes = start_ranks(command(recipe), 2)
    wait_for_records(run, random.randint(5, STEPS - 3), processes)
    time.sleep(random.uniform(0, 0.1))
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    assert len(curve(run)) < STEPS
    (out, _), _ = run_ranks(command(recipe), 2)
    assert json.loads(out)["resumed_from"] >= 4
    assert curve(run) == undisturbed[zero]


@pytest.mark.slow
def test_another_world_size_and_stage_continue_the_same_samples(
    undisturbed: dict[str, list[dict[str, Any]]], digits: Path, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path, digits, tmp_path / "run", deepspeed="zero1"), tmp_path / "run"
    run_ranks(command(recipe, "train.max_steps=4"), 2)
    run_ranks(command(recipe, "train.max_steps=8", "train.deepspeed=zero2"), 1)
    run_ranks(command(recipe, "train.max_steps=11", "train.deepspeed=zero3"), 2)
    run_ranks(command(recipe, "train.deepspeed=zero0"), 1)
    for found, expected in zip(curve(run), undisturbed["zero1"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), found["step"]
        assert found["lr"] == expected["lr"]


@pytest.mark.slow
def test_a_signal_saves_and_exits_3_and_the_next_start_continues(
    undisturbed: dict[str, list[dict[str, Any]]], digits: Path, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path, digits, tmp_path / "run", deepspeed="zero1"), tmp_path / "run"
    processes = start_ranks(command(recipe), 2)
    wait_for_records(run, 2, processes)
    processes[1].send_signal(signal.SIGTERM)  # one rank alone: all must agree
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [3, 3], outputs
    result = json.loads(outputs[0][0])
    assert (run / "checkpoints" / f"step_{result['step']:08d}" / "manifest.json").is_file()
    assert len(curve(run)) == result["step"] < STEPS
    run_ranks(command(recipe), 2)
    assert curve(run) == undisturbed["zero1"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    undisturbed: dict[str, list[dict[str, Any]]], digits: Path, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path, digits, tmp_path / "run", deepspeed="zero1"), tmp_path / "run"
    run_ranks(command(recipe, "train.max_steps=9"), 2)
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    file = newest / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    (out, err), _ = run_ranks(command(recipe), 2)
    assert json.loads(out)["resumed_from"] == 8
    assert f"{newest.name} is damaged" in err
    assert curve(run) == undisturbed["zero1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"],
        ["deepspeed.launcher.runner", "--num_gpus=2", "--module"],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_launchers(
    undisturbed: dict[str, list[dict[str, Any]]], digits: Path, tmp_path: Path, launcher: list[str]
) -> None:
    recipe, run = write_recipe(tmp_path, digits, tmp_path / "run", deepspeed="zero1"), tmp_path / "run"
    started = subprocess.run(
        [sys.executable, "-m", *launcher, "lut_ds", "pretrain", str(recipe), "train.max_steps=4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert started.returncode == 0, started.stderr[-3000:]
    assert curve(run) == undisturbed["zero1"][:4]
