"""`lut-ds sweep` with real runs: finished, interrupted and failing ones, and the table at the end."""

import fcntl
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from lut_ds.cli import main
from lut_ds.data.shapes import write_shapes
from lut_ds.engine.runfolder import claim
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
    assert "1 of 2 runs are missing" in (out / "table.md").read_text()
    assert "- lut, seed 3: FAILED: run.dir: " in (out / "table.md").read_text()

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

    for words, why in (
        (
            ["optim.blr=0.5"],
            "holds a run of another recipe: optim.blr is 0.00015 there and 0.5 here; give the run another",
        ),
        (["train.max_steps=3"], "holds a run of 4 steps: expected at most train.max_steps 3"),
        (["precision.teacher=bf16"], "precision.teacher is 'fp32' there and 'bf16' here"),
        ([f"data.path={write_shapes(tmp_path / 'more', 56, 20, 16)}"], "its train set has 48 in 10 classes, that of "),
        ([f"data.path={write_shapes(tmp_path / 'other', 48, 20, 16, 1)}"], "/other has 48 others in 10; name the same"),
    ):
        code, again, said = sweep(capfd, path, out, "train.max_steps=4", *words)
        assert (code, again) == (2, result)
        assert f"lut-ds: sweep {path}: runs.mae: {out}/runs/mae/seed_3 " in said
        assert why in said
        assert said.count("\n") == 1

    with claim(out, "--out"):
        code, _, said = sweep(capfd, path, out, "train.max_steps=4")
    assert (code, f"--out: {out} is in use by process {os.getpid()} on" in said) == (2, True)

    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    moved = f"data.path={tmp_path / 'moved'}"
    path.write_text(path.read_text().replace("lut: {}", "lut: {}\n  later: {method.w_bc: 1}"))
    code, result, said = sweep(capfd, path, out, "--no-training", "train.max_steps=4", moved)
    assert (code, result["missing"]) == (0, ["later, seed 3"])
    assert "1 of 3 runs are missing" in (out / "table.md").read_text()
    assert "- later, seed 3: not finished" in (out / "table.md").read_text()
    code, result, said = sweep(capfd, path, out, "train.max_steps=4", moved)
    assert (code, result["missing"], list(result["failed"])) == (0, [], [])
    assert "3 runs, 2 of them finished before" in said
    assert (starts(mae), starts(lut)) == (1, 1)


def test_an_interrupted_sweep_continues(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ended by a time limit, by a stop file, by a signal."""
    long = {"train.epochs": 400}
    path, out = write(tmp_path, runs={"a": long, "b": long}, evaluate=["knn"], pixels=False), tmp_path / "out"
    run = out / "runs" / "a" / "seed_0"
    code, result, said = sweep(capfd, path, out, "run.log_every=1", "run.time_limit=1")
    assert (code, result["stopped_by"], result["failed"]) == (3, "time limit", {})
    assert "a, seed 0: stopped" in said
    assert not (out / "runs" / "b").exists()  # its time is over too

    write(tmp_path, runs={"a": long}, evaluate=["knn"], pixels=False)
    (run / "stop").touch()
    code, result, _ = sweep(capfd, path, out, "run.log_every=1")
    assert (code, result["stopped_by"], result["missing"]) == (3, None, ["a, seed 0"])
    assert "stopped by stop file at step" in result["stopped"]["a, seed 0"]
    before = len(read_metrics(run / "metrics.jsonl"))

    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.05):
            if len(read_metrics(run / "metrics.jsonl")) > before:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    try:
        code, result, said = sweep(capfd, path, out, "run.log_every=1")
    finally:
        over.set()
        thread.join()
    assert code == 3
    assert (result["stopped_by"], result["failed"], result["missing"]) == ("SIGTERM", {}, ["a, seed 0"])
    assert "a, seed 0: stopped" in said
    done = len(read_metrics(run / "metrics.jsonl"))
    assert before < done < 1200
    code, result, _ = sweep(capfd, path, out, "run.log_every=1", f"train.max_steps={done + 3}")
    assert (code, result["runs"][0]["training"]["steps"]) == (0, done + 3)
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == list(range(1, done + 4))
    assert starts(run) == 4


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
    (tmp_path / "table.csv").write_text("mine")
    code, _, said = sweep(capfd, path, tmp_path)
    assert (code, f"--out: {tmp_path} holds a table.csv and no sweep.json" in said) == (2, True)
    assert (tmp_path / "table.csv").read_text() == "mine"
