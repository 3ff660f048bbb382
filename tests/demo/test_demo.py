import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from lut_ds.demo import run_demo
from lut_ds.errors import UserError
from lut_ds.tracking import read_metrics
from tests.engine.launching import PATIENCE
from tests.transfer.runs import TINY, lut_ds


def test_the_demo_leaves_everything_it_names(demo):
    result = json.loads((demo / "result.json").read_text())
    assert json.loads((demo / result["files"]["results"]).read_text()) == result
    for name in ("reconstruction", "curves", "knn"):
        with Image.open(demo / result["files"][name]) as image:
            assert image.format == "PNG"
    html = (demo / result["files"]["report"]).read_text()
    assert f"{result['knn']['top1']['teacher']:.1f}" in html
    assert "handwritten digits" in html
    assert not [p for p in (demo / "runs" / "demo").iterdir() if p.name.endswith(".partial")]


def test_the_numbers_are_of_the_whole_run(demo):
    result = json.loads((demo / "result.json").read_text())
    assert result["stopped_by"] is None
    assert (result["step"], result["epochs"]) == (30, 3.0)
    assert result["images"]["train"] + result["images"]["val"] == 1797
    knn = result["knn"]
    assert [entry["epoch"] for entry in knn["over_the_run"]] == [1.0, 2.0, 3.0]
    assert list(knn["top1"]) == ["raw_pixels", "random_encoder", "student", "teacher"]
    assert knn["top1"]["raw_pixels"] > 95
    assert all(10 < value < 100 for value in knn["top1"].values())
    assert knn["over_the_run"][-1]["student"]["10"] == knn["top1"]["student"]
    assert result["last_epoch"]["mae"] < result["first_epoch"]["mae"]


def test_it_says_what_it_is_doing(demo):
    said = (demo / "stderr.txt").read_text()
    for step in ("1/4 data", "2/4 pre-training", "3/4 k-NN", "4/4 pictures"):
        assert step in said


@pytest.mark.slow
def test_mae_has_no_teacher_to_show(tmp_path):
    done = lut_ds("demo", *TINY, "method.name=mae", "train.max_steps=10", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["knn"]["top1"]) == ["raw_pixels", "random_encoder", "student"]
    assert "teacher" not in result["knn"]["over_the_run"][0]
    assert "MAE on handwritten digits" in (tmp_path / result["files"]["report"]).read_text()


@pytest.mark.slow
def test_a_second_demo_only_reports_again(demo, tmp_path):
    shutil.copytree(demo / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "demo" / "report.html").unlink()
    before = json.loads((demo / "result.json").read_text())
    done = lut_ds("demo", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "runs" / "demo" / "results.json").read_text())
    assert after["knn"] == before["knn"]
    assert after["training_seconds"] == before["training_seconds"]
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    for line in ("raw pixels", "random encoder", "student", "teacher"):
        assert line in done.stdout
    changed = lut_ds("demo", *TINY, "optim.blr=0.5", cwd=tmp_path)
    assert changed.returncode == 2
    assert "optim.blr" in changed.stderr


def test_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="expected one process"):
        run_demo([])


def test_the_demo_refuses_what_it_cannot_picture():
    with pytest.raises(UserError, match=r"method\.degradation.*pretrain"):
        run_demo(["method.degradation=blurred"])


# The command, which gets a SIGTERM in its fifth step.
INTERRUPTED = """
import os, signal, sys
from lut_ds.cli import main
from lut_ds.engine.step import Trainer

update, steps = Trainer.update, iter(range(1, 10**9))

def interrupted(*args, **options):
    if next(steps) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(*args, **options)

Trainer.update = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_interrupted_demo_continues(demo, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, "demo", *TINY, "run.save_every=2"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    metrics = tmp_path / "runs" / "demo" / "metrics.jsonl"
    assert first.returncode == 3, first.stderr
    assert "the same command continues" in first.stdout
    assert 5 <= len(read_metrics(metrics)) < 30
    assert not (tmp_path / "runs" / "demo" / "report.html").exists()
    done = lut_ds("demo", *TINY, "run.save_every=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = read_metrics(demo / "runs" / "demo" / "metrics.jsonl")
    assert [r["loss"] for r in read_metrics(metrics)] == [r["loss"] for r in whole]
