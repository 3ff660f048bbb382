"""`lut-ds sweep` with real runs: finished, interrupted and failing ones, and the table at the end."""

import fcntl
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lut_ds.cli import main
from lut_ds.data.shapes import write_shapes
from lut_ds.tracking import read_metrics
from tests.engine.tiny import tiny_tree

EVALUATE = ["knn", "probe", "attention_distance", "spectrum"]


def write(folder: Path, **tree: Any) -> Path:
    recipe = tiny_tree()
    recipe["data"] = {"path": str(write_shapes(folder / "data", 48, 20, 16))}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "s.yaml").write_text(
        yaml.safe_dump({"recipe": "tiny.yaml", "pixels": True, "evaluate": EVALUATE, **tree}, sort_keys=False)
    )
    return folder / "s.yaml"


def sweep(capfd: pytest.CaptureFixture[str], path: Path, out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, what is in sweep.json, and all that was printed."""
    capfd.readouterr()
    code = main(["sweep", str(path), "--out", str(out), *arguments, "--json"])
    written = out / "sweep.json"
    return code, json.loads(written.read_text()) if written.is_file() else {}, "".join(capfd.readouterr())


def starts(run: Path) -> int:
    return len((run / "environment.jsonl").read_text().splitlines())


def test_one_fails_and_the_rest_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path, seeds=[3], runs={"mae": {"method.name": "mae"}, "lut": {}}), tmp_path / "out"
    lut, mae = (out / "runs" / name / "seed_3" for name in ("lut", "mae"))
    lut.mkdir(parents=True)
    with (lut / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process works on that run
        lock.write("process 7 on elsewhere\n")
        lock.flush()
        code, result, said = sweep(capfd, path, out, "--jobs", "2", "train.max_steps=4")
    assert code == 1
    assert "lut, seed 3: FAILED" in said
    assert "in use by process 7 on elsewhere" in result["failed"]["lut, seed 3"]
    assert result["missing"] == ["lut, seed 3"]
    assert [(row["run"], row["weights"]) for row in result["table"]] == [("mae", "student")]

    code, result, said = sweep(capfd, path, out, "train.max_steps=4")
    assert (code, result["failed"], result["missing"]) == (0, {}, [])
    assert "2 runs, 1 of them finished before" in said
    assert starts(mae) == 1
    rows = {(row["run"], row["weights"]): row for row in result["table"]}
    assert list(rows) == [("mae", "student"), ("lut", "student"), ("lut", "teacher")]
    for row in rows.values():
        assert 0 <= row["knn"]["mean"] <= 100
        assert 0 <= row["probe"]["mean"] <= 100
        assert 0 < row["attention_distance"]["mean"] < 16 * 2**0.5
        assert 1 <= row["effective_rank"]["mean"] <= 19  # 20 images
    assert rows["lut", "student"]["tflop"]["mean"] > 2 * rows["mae", "student"]["tflop"]["mean"]
    assert result["raw_pixels"]["images"] == {"train": 48, "val": 20}
    assert json.dumps(result) in said
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| lut | teacher | 1 |" in (out / "table.md").read_text()

    code, _, said = sweep(capfd, path, out, "train.max_steps=4", "optim.blr=0.5")
    assert code == 2
    assert "holds a run of another recipe: optim.blr" in said


def test_an_interrupted_sweep_continues(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path, runs={"a": {"train.epochs": 400}}, evaluate=["knn"]), tmp_path / "out"
    run = out / "runs" / "a" / "seed_0"

    def interrupt() -> None:
        while not (run / "metrics.jsonl").is_file() or not read_metrics(run / "metrics.jsonl"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, result, said = sweep(capfd, path, out, "run.log_every=1")
    thread.join()
    assert code == 3
    assert (result["stopped_by"], result["failed"], result["missing"]) == ("SIGTERM", {}, ["a, seed 0"])
    assert "a, seed 0: stopped" in said
    done = len(read_metrics(run / "metrics.jsonl"))
    assert 0 < done < 1200
    code, result, _ = sweep(capfd, path, out, "run.log_every=1", f"train.max_steps={done + 3}")
    assert (code, result["runs"][0]["training"]["steps"]) == (0, done + 3)
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == list(range(1, done + 4))
    assert starts(run) == 2


def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path, runs={"a": {}, "b": {"train.global_batch": 64}}), tmp_path / "out"
    code, _, said = sweep(capfd, path, out)
    assert code == 2
    assert "runs.b: data.path" in said
    assert "at least 64 training images, found 48" in said
    code, _, said = sweep(capfd, path, out, "data.path=/nowhere")
    assert (code, "/nowhere" in said) == (2, True)
    assert not out.exists()
