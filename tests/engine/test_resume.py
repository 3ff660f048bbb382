"""Runs that are killed, stopped or resized continue as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lut_ds.engine.files import describe_file
from lut_ds.engine.manifest import step_folders, verify
from lut_ds.tracking import read_events, read_metrics
from tests.engine.launching import PATIENCE, ROOT, Process, free_port, run_ranks, start_ranks
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


def wait_for_records(run: Path, count: int, processes: list[Process]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        ended = any(p.poll() is not None for p in processes)  # before the look at what they wrote
        if len(read_metrics(run / "metrics.jsonl")) >= count:
            return
        assert not ended, "a rank ended by itself: " + processes[0].communicate()[1][-2000:]
        assert time.monotonic() < deadline, "no progress"
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
    deadline = time.monotonic() + PATIENCE
    while not (run / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)  # it is written beside the steps
    time.sleep(random.uniform(0, 0.1))
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    kept = next(int(f.name.removeprefix("step_")) for f in step_folders(run / "checkpoints") if verify(f) is None)
    (out, _), _ = run_ranks(command(recipe), 2)
    assert json.loads(out)["resumed_from"] == kept >= 4
    assert curve(run) == undisturbed[zero]


SIZES = [(1, "zero1"), (2, "zero2"), (4, "zero1"), (3, "zero3"), (1, "zero0")]


@pytest.mark.slow
def test_other_world_sizes_and_stages_continue_the_same_samples(digits: Path, tmp_path: Path) -> None:
    """1, 2, 4 and 3 ranks with stages 1 to 2, 2 to 1 and 3, two steps each, against two ranks all along."""
    recipe, run = write_recipe(tmp_path, digits, tmp_path / "run"), tmp_path / "run"
    batch, steps = "train.global_batch=24", 2 * len(SIZES)
    run_ranks(command(recipe, batch, f"train.max_steps={steps}", f"run.dir={tmp_path}/whole"), 2)
    for number, (ranks, stage) in enumerate(SIZES, start=1):
        overrides = [batch, f"train.max_steps={2 * number}", f"train.deepspeed={stage}"]
        said = run_ranks(command(recipe, *overrides), ranks)[0][1]
        before = SIZES[number - 2][0]
        assert (
            number == 1 or f"continuing {run} from step_{2 * number - 2:08d}, resized {before} -> {ranks} ranks" in said
        )
    found, expected = curve(run), curve(tmp_path / "whole")
    assert [record["step"] for record in found] == list(range(1, steps + 1))
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "mae", "bc", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)
        assert (one["lr"], one["ema_decay"]) == (other["lr"], other["ema_decay"])
    resumed = [event for event in read_events(run / "events.jsonl") if event["event"] == "resumed"]
    assert [(event["ranks_before"], event["ranks"]) for event in resumed] == [(1, 2), (2, 4), (4, 3), (3, 1)]


@pytest.mark.slow
def test_a_signal_saves_and_exits_3_and_the_next_start_continues(digits: Path, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, digits, tmp_path / "run", deepspeed="zero1"), tmp_path / "run"
    processes = start_ranks(command(recipe, "train.max_steps=400"), 2)  # many: the signal may come late
    wait_for_records(run, 2, processes)
    processes[1].send_signal(signal.SIGTERM)  # one rank alone: all must agree
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [3, 3], outputs
    result = json.loads(outputs[0][0])
    assert (run / "checkpoints" / f"step_{result['step']:08d}" / "manifest.json").is_file()
    assert len(curve(run)) == result["step"] < 400
    end = f"train.max_steps={result['step'] + 4}"
    for folder in (run, tmp_path / "whole"):
        run_ranks(command(recipe, end, f"run.dir={folder}"), 2)
    assert curve(run) == curve(tmp_path / "whole")


class Malicious:
    """Unpickling this makes a folder."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sign),)


@pytest.mark.slow
def test_a_malicious_checkpoint_is_passed_over_and_never_executed(
    undisturbed: dict[str, list[dict[str, Any]]], digits: Path, tmp_path: Path
) -> None:
    """Pickles in the places of our files, with size and hash made right, and one more beside them."""
    recipe, run, sign = (
        write_recipe(tmp_path, digits, tmp_path / "run", deepspeed="zero1"),
        tmp_path / "run",
        tmp_path / "x",
    )
    run_ranks(command(recipe, "train.max_steps=9"), 2)
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    manifest = json.loads((newest / "manifest.json").read_text())
    for name in ("rank_00001.safetensors", "shared.safetensors", "evil.pt"):
        torch.save(Malicious(sign), newest / name)
    for name in manifest["files"]:
        manifest["files"][name] = describe_file(newest / name)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    read = "import sys; from lut_ds.transfer.load import *; load_student(find_checkpoint(sys.argv[1]))"
    for program in (["-c", read, newest], ["-m", "lut_ds", "export", newest, "-o", tmp_path / "out"]):
        done = subprocess.run(
            [sys.executable, *map(str, program)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert f"{newest}: damaged: rank_00001.safetensors" in done.stderr.splitlines()[-1]
    (out, err), _ = run_ranks(command(recipe), 2)
    assert json.loads(out)["resumed_from"] == 8
    assert f"{newest.name} is damaged" in err
    assert curve(run) == undisturbed["zero1"]
    assert not sign.exists()
    torch.save(Malicious(sign), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert sign.exists()  # the trap works


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"],
        ["deepspeed.launcher.runner", "--num_gpus=2", "--master_port={port}", "--module"],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_launchers(
    undisturbed: dict[str, list[dict[str, Any]]], digits: Path, tmp_path: Path, launcher: list[str]
) -> None:
    recipe, run = write_recipe(tmp_path, digits, tmp_path / "run", deepspeed="zero1"), tmp_path / "run"
    words = [word.format(port=free_port()) for word in launcher]
    started = subprocess.run(
        [sys.executable, "-m", *words, "lut_ds", "pretrain", str(recipe), "train.max_steps=4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert started.returncode == 0, started.stderr[-3000:]
    assert curve(run) == undisturbed["zero1"][:4]
