"""What stops a run before its last step, and when: signals, the time limit, a stop file."""

import json
import math
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from lut_ds.config import load_recipe
from lut_ds.durations import seconds_of
from lut_ds.engine.launch import Ranks
from lut_ds.engine.signals import StopRequest, listen
from lut_ds.engine.stopping import StopConditions
from lut_ds.engine.timelimit import end_time
from lut_ds.errors import UserError
from lut_ds.tracking import read_events, read_metrics
from tests.engine.launching import PATIENCE, Process, start_ranks
from tests.engine.test_resume import STEPS, command, run_ranks, wait_for_records, write_recipe

STARTED = psutil.Process().create_time()


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 90), ("02:00", 120), ("23:30:00", 84600), ("1-00:00:05", 86405), ("01:02:03\n", 3723)]
    + [(text, None) for text in ("UNLIMITED", "INVALID", "", "1:2:3:4", "-5", "1-", "1h")],
)
def test_durations_as_slurm_writes_them(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("value", ["1h", "''", "0", "-3", "true", "soon"])
def test_a_time_limit_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"run\.time_limit"):
        load_recipe("demo", [f"run.time_limit={value}"])


def test_time_limits_in_recipes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("run: {time_limit: 23:30:00}")  # a number to YAML 1.1
    for recipe in (load_recipe(str(path)), load_recipe("demo", ["run.time_limit=23:30:00"])):
        assert end_time(recipe.run.time_limit, {}) == STARTED + 84600
    assert load_recipe("demo").run.time_limit == "auto"
    assert load_recipe("demo", ["run.time_limit=null"]).run.time_limit is None


def test_the_jobs_end_is_slurms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert end_time("auto", {}) is None
    assert end_time("auto", {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1800000000"}) == 1800000000
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    assert end_time("auto", {"SLURM_JOB_ID": "7"}) is None
    squeue = tmp_path / "squeue"
    squeue.write_text(
        '#!/bin/sh\ncase "$*" in *" 7 --format %L") echo 1:00:00 ;; *" 8 "*) echo UNLIMITED ;; '
        '*" 5_2 "*) echo 30:00 ;; *" 5 "*) echo 30:00; echo 45:00 ;; *) exit 1 ;; esac\n'
    )
    squeue.chmod(0o755)
    task = {"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}  # 5 alone is every task's
    assert end_time("auto", task) == pytest.approx(time.time() + 1800, abs=300)
    assert end_time("auto", {"SLURM_JOB_ID": "7"}) == pytest.approx(time.time() + 3600, abs=300)
    assert end_time("auto", {"SLURM_JOB_ID": "8"}) is None
    assert end_time("auto", {"SLURM_JOB_ID": "8"}, again=True) == math.inf
    assert end_time("auto", {"SLURM_JOB_ID": "9"}, again=True) is None  # no such job
    stated = {"SLURM_JOB_ID": "9", "SLURM_JOB_END_TIME": "1800000000"}
    assert end_time("auto", stated, again=True) == 1800000000


def test_a_limit_that_was_extended_is_asked_for_once_there_is_no_time_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho asked >>{tmp_path}/asked\ncat {tmp_path}/left\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(round(time.time()) + 60))
    (tmp_path / "left").write_text("01:00:00\n")  # scontrol update jobid=7 timelimit=+60
    stop = conditions(tmp_path, "run.stop_margin=100")
    assert not stop.wanted(False)
    assert not stop.wanted(False)
    assert (tmp_path / "asked").read_text() == "asked\n"
    assert "extended" in capsys.readouterr().out
    (tmp_path / "left").write_text("1:01\n")  # no more than before
    assert conditions(tmp_path, "run.stop_margin=100").wanted(False)


def conditions(folder: Path, *overrides: str, save_seconds: float = 0.0) -> StopConditions:
    import torch

    recipe = load_recipe("demo", ["run.log_every=10", *overrides])
    alone = Ranks(0, 1, 0, torch.device("cpu"), "none")
    return StopConditions(recipe, alone, folder, StopRequest(), lambda: save_seconds, print)


def test_the_time_limit_leaves_room_for_steps_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An hour left: enough for a margin of 2000 s, not for two saves of 900 s besides, nor for eleven steps of 0.4 s and 3598 s."""
    limit = f"run.time_limit={round(time.time() - STARTED) + 3600}"
    assert not conditions(tmp_path, limit, "run.stop_margin=2000").wanted(False)
    assert conditions(tmp_path, limit, "run.stop_margin=2000", save_seconds=900).wanted(False)
    assert "less than" not in capsys.readouterr().out
    assert conditions(tmp_path, limit, "run.stop_margin=4000").wanted(False)
    assert re.search(r"limit in 3[56]\d\d s, less than run.stop_margin 4000 s: .* first steps", capsys.readouterr().out)
    limit = f"run.time_limit={round(time.time() - STARTED) + 3600}"
    slow = conditions(tmp_path, limit, "run.stop_margin=3598")
    time.sleep(0.4)
    assert slow.wanted(False)


def test_the_stop_file_is_looked_for_when_votes_are_counted(tmp_path: Path) -> None:
    stop = conditions(tmp_path)
    assert not stop.wanted(True)
    (tmp_path / "stop").touch()
    assert not stop.wanted(False)
    assert stop.wanted(True)
    assert stop.wanted(False)  # and does not change its mind


def test_only_the_named_signals_are_taken() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with listen(["SIGUSR2", "SIGHUP"]) as request:
        assert signal.getsignal(signal.SIGUSR1) == before
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal_name == "SIGHUP"
    with pytest.raises(UserError, match=r"run\.stop_signals"):
        load_recipe("demo", ["run.stop_signals=[SIGKILL]"])


def stopped(processes: list[Process], run: Path) -> str:
    """Wait for ranks that stop with a checkpoint of their last step; returns what stopped them."""
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [3] * len(processes), outputs
    result = json.loads(outputs[0][0])
    assert (run / "checkpoints" / "latest").read_text() == f"step_{result['step']:08d}\n"
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == list(range(1, result["step"] + 1))
    assert result["step"] < STEPS * 100
    event = read_events(run / "events.jsonl")[-1]
    assert (event["event"], event["by"], event["step"]) == ("stopped", result["stopped_by"], result["step"])
    return result["stopped_by"]


@pytest.mark.slow
def test_file_signal_and_time_limit_stop_all_ranks_with_a_checkpoint(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin = command(
        write_recipe(tmp_path, digits, run, epochs=100), f"train.max_steps={STEPS * 100}", "run.save_every=50"
    )
    processes = start_ranks(begin, 2)
    wait_for_records(run, 2, processes)
    (run / "stop").touch()
    assert stopped(processes, run) == "stop file"
    assert not (run / "stop").exists()
    done = len(read_metrics(run / "metrics.jsonl"))
    processes = start_ranks(begin, 2)
    wait_for_records(run, done + 2, processes)
    processes[1].send_signal(signal.SIGUSR2)
    assert stopped(processes, run) == "SIGUSR2 to rank 1"
    processes = start_ranks([*begin, "run.time_limit=00:01:00", "run.stop_margin=59"], 2)
    assert stopped(processes, run) == "time limit"
    run_ranks([*begin, f"train.max_steps={len(read_metrics(run / 'metrics.jsonl')) + 2}"], 2)
