"""Two or three real ranks, one of which is not well: what is said, and how the run ends."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lut_ds.engine.manifest import verify
from lut_ds.tracking import read_events, read_metrics
from tests.engine.launching import PATIENCE, Process, run_ranks, start_ranks
from tests.engine.test_resume import wait_for_records
from tests.engine.tiny import tiny_tree

HANG = 12.0  # seconds: a tiny step never takes so long, and a living thread shows itself many times in it


def write_recipe(folder: Path, digits: Path, run: dict[str, Any], guard: dict[str, Any], **train: Any) -> Path:
    tree = tiny_tree(**train)
    tree["data"] = {"path": str(digits), "threads": 1}
    tree["run"] = {"dir": str(folder / "run"), "seed": 3, **run}
    tree["guard"] = guard
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def sick(ailment: str, recipe: Path) -> list[str]:
    return [sys.executable, "-m", "tests.engine.guards.sick_worker", ailment, str(recipe)]


def ended(processes: list[Process]) -> list[str]:
    """Standard error of processes that must end by themselves."""
    try:
        return [process.communicate(timeout=PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_ends_but_a_suspended_run_goes_on(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path, digits, {"log_every": 2}, {"hang_seconds": HANG}, epochs=100)
    processes = start_ranks([sys.executable, "-m", "lut_ds", "pretrain", str(recipe)], 2)
    try:
        wait_for_records(run, 4, processes)
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * HANG)
        before = len(read_metrics(run / "metrics.jsonl"))
        for process in processes:
            process.send_signal(signal.SIGCONT)
        wait_for_records(run, before + 10, processes)
        processes[1].send_signal(signal.SIGSTOP)
        _, said = processes[0].communicate(timeout=PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 1
    assert re.search(r"lut-ds: hang: no step for \d+ s: rank 1 on \S+: no sign of life, last seen", said), said
    (event,) = [e for e in read_events(run / "events.jsonl") if e["event"] == "hang"]
    assert event["missing"] == [1]
    assert event["seconds"] >= HANG
    stack = (run / "stacks" / "rank_00000.txt").read_text()
    assert "engine/step.py" in stack
    assert "in update" in stack


@pytest.mark.slow
def test_a_rank_that_waits_for_data_for_ever_is_named_with_its_stack(digits: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, digits, {"log_every": 2}, {"hang_seconds": HANG}, epochs=100)
    processes = start_ranks(sick("stalled", recipe), 2)
    said = ended(processes)
    assert [process.returncode for process in processes] == [1, 1], said
    events = read_events(tmp_path / "run" / "events.jsonl")
    (event,) = [e for e in events if e["event"] == "hang"]
    assert event["missing"] == [1]
    assert "waiting for data of step" in event["text"]
    assert event["text"] in said[0]
    stacks = [(tmp_path / "run" / "stacks" / f"rank_0000{rank}.txt").read_text() for rank in range(2)]
    assert "stalled_read" in stacks[1]
    assert "stalled_read" not in stacks[0]
    assert "in update" in stacks[0]


@pytest.mark.slow
def test_an_error_of_one_rank_ends_the_others_at_once(digits: Path, tmp_path: Path) -> None:
    # Saves that are waited for: of one in flight nobody knows whether the error comes first.
    run = {"log_every": 2, "save_every": 4, "async_save": False}
    recipe = write_recipe(tmp_path, digits, run, {}, epochs=100)
    processes = start_ranks(sick("raising", recipe), 2)
    said = ended(processes)  # long before gloo (half an hour) or the watchdog (ten minutes) would end them
    assert [process.returncode for process in processes] == [1, 1], said
    assert "RuntimeError: an error of this rank alone" in said[1]
    assert said[0].splitlines()[-1] == (
        "lut-ds: launch: rank 0 lost another rank, whose own message says why; the last good checkpoint is intact"
    )
    assert "Traceback" not in said[0]
    (kept,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert kept.name == "step_00000004"
    assert verify(kept) is None
    assert not (tmp_path / "run" / "heartbeats").exists()


@pytest.mark.slow
@pytest.mark.parametrize("hash_every, save_every", [(2, 4), (100, 3)])  # by the regular comparison, by that of a save
def test_a_rank_with_another_model_ends_the_run_before_a_save(
    digits: Path, tmp_path: Path, hash_every: int, save_every: int
) -> None:
    run = {"log_every": 4, "save_every": save_every}
    recipe = write_recipe(tmp_path, digits, run, {"hash_every": hash_every}, max_steps=12, global_batch=15)
    processes = start_ranks(sick("flipped", recipe), 3)
    said = ended(processes)
    assert [process.returncode for process in processes] == [1, 1, 1], said
    expected = "step 6: rank 2 holds another model than the other 2 ranks; the first tensor that differs is student."
    assert all(expected in text for text in said)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")] == [f"step_0000000{save_every}"]


@pytest.mark.slow
def test_a_slow_leaking_rank_and_a_teacher_that_stands_still_are_said(digits: Path, tmp_path: Path) -> None:
    guard = {"hash_every": 20, "straggler_factor": 1.2}
    recipe = write_recipe(tmp_path, digits, {"log_every": 2, "save_every": 500}, guard, max_steps=120)
    (out, err), _ = run_ranks(sick("sick", recipe), 2)
    counts = json.loads(out)["events"]
    assert {"straggler", "memory", "teacher"} <= set(counts)
    said = read_events(tmp_path / "run" / "events.jsonl")
    # Those of the steps that wait; ranks that share busy cores differ in the short ones after them, too.
    first = next(event for event in said if event["event"] == "straggler" and event["cause"] == "waiting for data")
    events = {**{event["event"]: event for event in said}, "straggler": first}
    assert events["straggler"]["rank"] == events["memory"]["rank"] == 1
    assert events["straggler"]["host"] == os.uname().nodename
    assert events["memory"]["now"] > 1.2 * events["memory"]["before"]
    assert events["teacher"]["steps"] >= 100
    for kind in ("straggler", "memory", "teacher"):
        assert events[kind]["text"] in err


@pytest.mark.slow
def test_nothing_is_said_of_a_healthy_run(digits: Path, tmp_path: Path) -> None:
    # Ranks that share busy cores do differ in speed: the factor keeps that from being said.
    guard = {"hash_every": 10, "hang_seconds": 30.0, "spike_window": 16, "straggler_factor": 1000.0}
    recipe = write_recipe(tmp_path, digits, {"log_every": 2, "save_every": 500}, guard, max_steps=70)
    (out, _), _ = run_ranks([sys.executable, "-m", "lut_ds", "pretrain", str(recipe), "--json"], 2)
    assert json.loads(out)["events"] == {}
    assert not (tmp_path / "run" / "heartbeats").exists()
    assert not (tmp_path / "run" / "stacks").exists()
