"""Processes side by side: which GPU each sees, and that none is left behind."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lut_ds.engine.signals import STOP_SIGNALS, StopRequest
from lut_ds.sweep.pool import Ended, Job, device_names, run_jobs
from tests.sweep.light_jobs import TOLD, end_after, linger, note


@pytest.mark.parametrize(
    "variable, count, names",
    [
        (None, 2, ["0", "1"]),
        ("3,1", 2, ["3", "1"]),
        ("GPU-8e1f, GPU-77aa", 2, ["GPU-8e1f", "GPU-77aa"]),
        ("1,-1,0", 1, ["1"]),  # CUDA reads no further than what is no device
        ("MIG-a,MIG-b,", 1, ["MIG-a", "MIG-b"]),  # and gives a process the first part of partitioned GPUs
        ("", 0, []),
    ],
)
def test_the_gpus_that_are_shared_out(variable: str | None, count: int, names: list[str]) -> None:
    assert device_names(variable, count) == names


def test_every_worker_sees_the_gpu_of_its_place(tmp_path: Path) -> None:
    """Three places on two GPUs: the third shares the first; who comes later takes the place that is free."""
    jobs = [Job(str(i), 1.0, note, (3,), tmp_path / f"{i}.json") for i in range(4)]
    ended = run_jobs(jobs, 3, 1, StopRequest(), lambda _: None, ["GPU-a", "3"])
    assert sorted((e.job.title, e.code) for e in ended) == [(str(i), 0) for i in range(4)]
    seen = [json.loads(job.log.read_text()) for job in jobs]
    assert all(s["imported"] == s["given"] for s in seen)
    assert all(set(STOP_SIGNALS) <= set(s["blocked"]) for s in seen)  # none ends it half imported
    assert [s["imported"] for s in seen[:3]] == ["GPU-a", "3", "GPU-a"]
    assert seen[3]["imported"] == {"0": "GPU-a", "1": "3", "2": "GPU-a"}[ended[0].job.title]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ or os.environ["CUDA_VISIBLE_DEVICES"] not in ("GPU-a", "3")


def test_jobs_are_told_to_stop_by_their_signal_and_none_outlives_a_fault(tmp_path: Path) -> None:
    lingering = Job("lingers", 1.0, linger, (), tmp_path / "pid", signal.SIGUSR2)
    stop = StopRequest()

    def ask() -> None:
        while not lingering.log.exists():
            time.sleep(0.02)
        stop.signal_name = "SIGTERM"

    thread = threading.Thread(target=ask)
    thread.start()
    (ended,) = run_jobs([lingering, lingering], 1, 1, stop, lambda _: None, ["0"])
    thread.join()
    assert ended.code == TOLD

    lingering.log.unlink()
    short = Job("ends", 1.0, end_after, (lingering.log,), tmp_path / "short")

    def fail(ended: Ended) -> None:
        raise OSError(f"no room for what is said of {ended.job.title}")

    with pytest.raises(OSError, match="said of ends"):
        run_jobs([lingering, short], 2, 1, StopRequest(), fail, ["0"])
    with pytest.raises(ProcessLookupError):
        os.kill(int(lingering.log.read_text()), 0)
