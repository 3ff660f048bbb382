"""metrics.jsonl as the truth across crashes, and a mirror that can neither stop nor slow a run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lut_ds.tracking import EventLog, MetricsLog, Progress, read_events, read_metrics
from tests.engine.launching import PATIENCE


def records(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1 / 3 + step, "lr": 1.5e-4} for step in steps]


def written(path: Path, *steps: int) -> Path:
    log = MetricsLog(path, 0)
    log.write(records(*steps))
    log.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_no_file_is_no_records(path: Path) -> None:
    assert read_metrics(path) == []


def test_values_come_back_to_the_bit(path: Path) -> None:
    values = [math.pi, 1e-300, 5e-324, 1.7976931348623157e308, -0.0, 0.1 + 0.2]
    log = MetricsLog(path, 0)
    log.write([{"step": i, "loss": value} for i, value in enumerate(values)])
    log.close()
    assert [math.copysign(1, r["loss"]) * abs(r["loss"]) for r in read_metrics(path)] == values
    assert [r["loss"].hex() for r in read_metrics(path)] == [value.hex() for value in values]


def test_every_line_is_json_even_for_a_loss_that_is_no_number(path: Path) -> None:
    log = MetricsLog(path, 0)
    log.write([{"step": 1, "loss": math.nan, "mae": math.inf, "bc": -math.inf, "epoch": 0.5}])
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = path.read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None, "mae": None, "bc": None, "epoch": 0.5}


def test_records_are_there_before_the_file_is_closed(path: Path) -> None:
    log = MetricsLog(path, 0)
    log.write(records(1, 2))
    assert read_metrics(path) == records(1, 2)
    log.close()


@pytest.mark.parametrize("resume, kept", [(0, []), (3, [1, 2, 3]), (6, [1, 2, 3, 4, 5, 6]), (100, [1, 2, 3, 4, 5, 6])])
def test_a_resumed_run_drops_what_it_will_run_again(path: Path, resume: int, kept: list[int]) -> None:
    written(path, 1, 2, 3, 4, 5, 6)
    log = MetricsLog(path, resume)
    assert log.last == len(kept)
    log.write(records(resume + 1))
    log.close()
    assert read_metrics(path) == records(*kept, resume + 1)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_kept_lines_do_not_change_by_a_byte(path: Path) -> None:
    before = written(path, 1, 2, 3).read_bytes()
    MetricsLog(path, 3).close()
    assert path.read_bytes() == before


def test_what_a_killed_start_left_beside_it_does_not_stay(path: Path) -> None:
    before = written(path, 1, 2, 3).read_bytes()
    path.with_name(f".{path.name}.partial").write_text("half a li")
    MetricsLog(path, 3).close()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(cut=st.integers(1, 200))
def test_a_file_cut_anywhere_keeps_its_whole_lines(path: Path, cut: int) -> None:
    whole = written(path, *range(1, 6)).read_bytes()
    left = whole[: max(0, len(whole) - cut)]
    path.write_bytes(left)
    # A last line that lost only its line end is whole.
    lines = sum(line.endswith(b"}") for line in left.split(b"\n"))
    assert read_metrics(path) == records(*range(1, 6))[:lines]
    log = MetricsLog(path, 100)
    log.write(records(9))
    log.close()
    assert read_metrics(path) == records(*range(1, 6))[:lines] + records(9)


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 3, "lo',
        b"\0" * 512,
        b"\xff\xfe\xb1",
        b"3\n",
        b"[]\n",
        b'"x"\n',
        b"null\n",
        b"{}\n",
        b'{"loss": 1}\n',
        b"\n",
    ],
)
def test_what_a_power_failure_leaves_at_the_end_is_dropped(path: Path, tail: bytes) -> None:
    with written(path, 1, 2).open("ab") as file:
        file.write(tail)
    assert read_metrics(path) == records(1, 2)
    MetricsLog(path, 2).close()
    assert read_metrics(path) == records(1, 2)


def test_progress_off_a_terminal_says_speed_and_can_be_closed_twice(capfd: pytest.CaptureFixture[str]) -> None:
    bar = Progress(4, 2, 64, 1e9, 1e12)
    bar.update(2, 128.0, {"loss": 0.5})
    bar.say("a line")
    bar.close()
    bar.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert "a line\n" in err
    assert "4/4 steps" in err
    assert "images/s=128.0" in err
    assert "MFU=12.8%" in err
    assert "loss=0.5" in err


def test_no_mfu_where_the_peak_is_unknown(capfd: pytest.CaptureFixture[str]) -> None:
    bar = Progress(1, 0, 64, 1e9, None)
    bar.update(1, 128.0, {})
    bar.close()
    assert "MFU" not in capfd.readouterr().err


MIRROR = """
import json, os, signal, sys, time
from pathlib import Path
import psutil
from lut_ds.tracking import WandbMirror

folder, how = Path(sys.argv[1]), sys.argv[2]

def wait(ready, seconds=300):
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return found

begun = time.perf_counter()
mirror = WandbMirror("offline", "p", "abc123", "run", folder, {"seed": 1})
started, up = time.perf_counter() - begun, None
for step in range(5):
    mirror.log({"step": step, "loss": 0.25})
if how != "missing":
    services = wait(lambda: [c for c in psutil.Process().children(recursive=True) if c.name() == "wandb-core"])
    up = time.perf_counter() - begun
    wait(lambda: any(p.stat().st_size for p in folder.rglob("*.wandb")))
    if how != "well":
        for service in services:
            service.send_signal({"killed": signal.SIGKILL, "hangs": signal.SIGSTOP}[how])
taken = []
for step in range(5, 2000):
    before = time.perf_counter()
    mirror.log({"step": step, "loss": 0.25, "text": "x" * 2000})
    taken.append(time.perf_counter() - before)
    if step % 100 == 0:
        time.sleep(0.02)
before = time.perf_counter()
mirror.close(300.0 if how == "well" else 2.0)
closed = time.perf_counter() - before
most = sorted(taken)[9 * len(taken) // 10]  # of all but the slowest tenth: a busy machine stops any process now and then
print(json.dumps({"started": started, "up": up, "most": most, "closed": closed, "dropped": mirror.dropped, "failed": mirror.failed}))
"""


def mirror(folder: Path, how: str, **env: str) -> tuple[dict[str, Any], str]:
    """What the mirror did in a process of its own, and what it said; fails unless that process ends, and well."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", MIRROR, str(folder), how],
        env={**clean, "HOME": str(folder), "WANDB__SERVICE_WAIT": "300", **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_offline_mirror_writes_and_is_silent(tmp_path: Path) -> None:
    did, said = mirror(tmp_path, "well")
    assert not did["failed"]
    assert said == ""
    (file,) = tmp_path.rglob("*.wandb")
    assert "abc123" in file.name
    assert file.read_bytes().count(b"loss") > 500


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_service_that_dies_or_hangs_neither_stops_nor_slows_a_run(tmp_path: Path, how: str) -> None:
    did, said = mirror(tmp_path, how)
    assert did["started"] < did["up"] / 2  # it does not wait for the service
    assert did["most"] < 0.05
    assert did["closed"] < 60
    assert did["dropped"] > 0  # the queue is bounded: what does not fit is dropped
    assert did["failed"]
    assert len(said.splitlines()) == 1
    assert said.startswith("wandb: mirror stopped, the run goes on: ")


def test_a_wandb_that_cannot_be_imported_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('broken installation')\n")
    did, said = mirror(tmp_path, "missing", PYTHONPATH=str(tmp_path))
    assert did["failed"]
    assert said == "wandb: mirror stopped, the run goes on: ImportError: broken installation\n"


def test_events_survive_a_torn_line_and_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("save", step=4, seconds=float("nan"))
    log.close()
    with path.open("a") as file:
        file.write('{"event": "sa')
    log = EventLog(path)
    log.write("resized", ranks=2)
    log.close()
    events = read_events(path)
    assert [(e["event"], e.get("step"), e.get("ranks")) for e in events] == [("save", 4, None), ("resized", None, 2)]
    assert events[0]["seconds"] is None
    assert read_events(tmp_path / "none") == []
