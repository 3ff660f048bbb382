"""`lut-ds report`: what the page shows is what the run folders hold, whatever state they are in."""

import base64
import json
import os
import platform
import re
import shutil
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lut_ds.analysis.curves import draw_runs, run_metrics
from lut_ds.analysis.figures import LIGHT
from lut_ds.analysis.report import summarise
from lut_ds.analysis.runs import read_runs, short_names, status, stored_analyses
from lut_ds.cli import main
from lut_ds.errors import UserError
from lut_ds.report import report
from lut_ds.transfer.config import FinetuneRecipe
from tests.analysis.test_report import parse

NASTY = "b <script>&\"'"


@pytest.fixture
def command(capfd):
    def call(*arguments, code=0):
        assert main([*map(str, arguments)]) == code
        return capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def evaluated(lut_run, tmp_path_factory):
    """A copy of the tiny demo's run in which knn and all analyses were run, and which met a few events."""
    run = tmp_path_factory.mktemp("evaluated") / "one"
    shutil.copytree(lut_run, run)
    assert main(["knn", str(run), "--k", "3,5"]) == 0
    assert main(["report", str(run), "--analyze"]) == 0
    with (run / "events.jsonl").open("a") as file:
        file.write(
            json.dumps({"time": "2026-01-02T03:04:05+0000", "event": "spike", "step": 7, "text": "x <b> 7"}) + "\n"
        )
    return run


def checked(file):
    """The page's text and its raw source, after everything that must hold for every page."""
    html = file.read_text()
    parser = parse(html)
    assert len(parser.ids) == len(set(parser.ids))
    assert {r for r in parser.references if r.startswith("#")} == {f"#{i}" for i in parser.ids}
    for image in (r for r in parser.references if not r.startswith("#")):
        assert base64.b64decode(image.removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"
    assert not re.search(r"https?:|@import|url\(|<script|<link", html)
    assert len(html) < 3e6
    return " ".join(" ".join(parser.text).split()), html


def test_a_run_and_all_that_was_found_about_it(evaluated, command):
    result = json.loads(command("report", evaluated, "--json").out)
    file = evaluated / "run-report.html"
    assert result["file"] == str(file)
    assert result["bytes"] == file.stat().st_size
    text, html = checked(file)
    headings = ["Overview", "Training", "Evaluations", "Reconstruction", "Analyses", "Recipe", "History", "Environment"]
    assert result["sections"] == headings
    assert re.findall(r"<h2>(.*?)</h2>", html) == headings
    summary = summarise(run_metrics(evaluated), 144)
    (run,) = result["runs"]
    assert run["last_epoch"] == summary.last
    assert run["state"] == "done"
    found = json.loads((evaluated / "evaluations" / "knn" / "results.json").read_text())
    best = max(found["top1"].values())
    assert run["evaluations"][f"k-NN top-1 (k = {found['best_k']})"] == best
    layers = json.loads((evaluated / "evaluations" / "analysis" / "layers.json").read_text())["found"]["one"]
    top1 = ", ".join(f"{value:.1f}" for value in layers["top1"])
    images = [f"{summary.images_per_second:,.0f} images a second", f"{summary.last['mae']:.4g}", f"{best:.2f}"]
    images += ["k-NN on mean features of the averaged weights, step 30."]
    for expected in (*images, f"Top-1 by layer {top1} %", "30 of 30 steps", "2026-01-02 03:04:05 spike x <b> 7"):
        assert expected in text, expected
    recipe = yaml.safe_load((evaluated / "recipe.yaml").read_text())
    for section, values in recipe.items():
        assert f"<summary>{section}</summary>" in html
        for key in values:
            assert f">{key}</th>" in html


def test_several_runs_share_axes_and_their_differences_are_marked(evaluated, mae_run, command, tmp_path):
    nasty = tmp_path / NASTY
    shutil.copytree(mae_run, nasty)
    result = json.loads(command("report", evaluated, nasty, "-o", tmp_path / "p.html", "--json").out)
    text, html = checked(tmp_path / "p.html")
    assert [run["name"] for run in result["runs"]] == ["one", NASTY]
    assert NASTY in text
    trees = [yaml.safe_load((path / "recipe.yaml").read_text()) for path in (evaluated, nasty)]
    assert result["differences"]["method.name"] == ["lut", "mae"]
    for name, values in result["differences"].items():
        section, key = name.split(".")
        assert values == [tree[section][key] for tree in trees]
        assert values[0] != values[1]
    marked = re.findall(r'<tr class="differs"><th scope="row">(.*?)</th>', html)
    assert "name" in marked
    assert list(result["differences"]) == sorted(result["differences"], key=lambda k: "-" in result["differences"][k])
    assert "seed" not in marked
    metrics = [run_metrics(path) for path in (evaluated, nasty)]
    figure = draw_runs([("one", metrics[0]), ("two", metrics[1])], ["loss", "bc", "images_per_s"])(LIGHT)
    loss, bc, speed = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    ends = [line.get_xdata()[-1] for line in loss.lines if len(line.get_xdata())]
    assert ends == [m[-1]["epoch"] for m in metrics]
    assert sum(len(line.get_xdata()) > 0 for line in bc.lines) == 1  # MAE has none
    recorded = [record["images_per_s"] for record in metrics[0] if "images_per_s" in record]
    assert next(line for line in speed.lines if len(line.get_xdata())).get_ydata().tolist() == recorded


def test_the_same_run_twice_is_told_apart(command, tmp_path):
    run = write_run(tmp_path / "run", MAE, 12)
    command("report", run, run, "-o", tmp_path / "p.html")
    text, _ = checked(tmp_path / "p.html")
    assert "The recipes are the same." in text
    assert "run (1)" in text
    assert "run (2)" in text
    assert short_names(["a/b/run", "a/c/run/"]) == ["b/run", "c/run"]
    assert short_names(["run", "run"]) == ["run (1)", "run (2)"]


def write_run(folder, recipe, steps, events=(), lock=None, per_epoch=5, **more):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = [{"step": s, "epoch": s / per_epoch, "lr": 1e-3, "loss": 3.0 / s, **more} for s in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if lock is not None:
        (folder / ".lock").write_text(lock)
    return folder


MAE = {"method": {"name": "mae"}, "train": {"epochs": 4, "global_batch": 8, "max_steps": None}}
STOPPED = {"event": "stopped", "step": 12, "by": "SIGTERM"}


@pytest.mark.parametrize(
    "steps, events, lock, state",
    [
        pytest.param(20, [], None, "done", id="whole"),
        pytest.param(12, [STOPPED], None, "stopped", id="stopped"),
        pytest.param(12, [], None, "broken off", id="cut"),
        pytest.param(14, [STOPPED], None, "broken off", id="cut after a stop"),
        pytest.param(14, [STOPPED, {"event": "resumed", "step": 12}], None, "broken off", id="cut after a resume"),
        pytest.param(12, [], f"process {os.getpid()} on {platform.node()}", "running", id="alive"),
        pytest.param(12, [], f"process 4194304 on {platform.node()}", "broken off", id="dead"),
        pytest.param(12, [], "process 1 on another-machine", "running", id="elsewhere"),
        pytest.param(12, [STOPPED], "garbage", "stopped", id="odd lock"),
    ],
)
def test_what_became_of_a_run(tmp_path, steps, events, lock, state):
    run = write_run(tmp_path / "run", MAE, steps, events, lock)
    (found,) = read_runs([str(run)])
    assert (found.step, found.steps) == (steps, 20)
    assert status(found).state == state


def test_a_run_that_was_to_end_early_is_done_then(tmp_path):
    run = write_run(tmp_path / "run", {**MAE, "train": {**MAE["train"], "max_steps": 12}}, 12)
    assert status(read_runs([str(run)])[0]).text == "done: 12 of 12 steps"


def test_a_segmentation_counts_iterations_not_epochs(tmp_path):
    recipe = {"data": {"stride": 1}, "train": {"iterations": 500, "global_batch": 8}}
    run = write_run(tmp_path / "run", recipe, 50, [{"event": "stopped", "step": 50, "by": "SIGTERM"}])
    found = status(read_runs([str(run)])[0])
    assert (found.state, "50 of 500 steps" in found.text) == ("stopped", True)


def test_an_incomplete_result_is_said_and_other_files_are_not_replaced(tmp_path):
    run = write_run(tmp_path / "run", MAE, 12)
    (run / "evaluations" / "knn").mkdir(parents=True)
    (run / "evaluations" / "knn" / "results.json").write_text('{"evaluation": "knn", "top1": {"5": 1.0, "9": null}}')
    text = report([str(run)])["file"]
    assert "its results.json is incomplete" in Path(text).read_text()
    with pytest.raises(UserError, match=r"recipe\.yaml: expected a new file or an earlier page"):
        report([str(run)], str(run / "recipe.yaml"))
    report([str(run)])  # over its own earlier page


def test_a_lock_that_was_left_behind_is_no_run(tmp_path):
    run = write_run(tmp_path / "run", MAE, 12, lock=f"process {os.getpid()} on {platform.node()}")
    long_ago = time.time() - 10**8
    os.utime(run / ".lock", (long_ago, long_ago))
    assert status(read_runs([str(run)])[0]).state == "broken off"
    (run / ".lock").write_text("process 1 on another-machine")
    os.utime(run / "metrics.jsonl", (long_ago, long_ago))
    assert status(read_runs([str(run)])[0]).state == "broken off"


def test_a_run_without_checkpoint_or_data_is_shown_as_far_as_it_goes(tmp_path, command):
    run = write_run(tmp_path / "run", MAE, 12)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "epo')  # the kill came in the middle of a line
    result = json.loads(command("report", run, "--json").out)
    text, _ = checked(run / "run-report.html")
    assert result["runs"][0]["step"] == 12
    assert "No pictures: checkpoint: " in text
    assert "Broken off (killed, or its machine was lost): 12 of 20 steps; no checkpoint was saved." in text


def test_a_fine_tuning_shows_its_accuracy_over_the_run(tmp_path, command):
    run = write_run(tmp_path / "run", json.loads(FinetuneRecipe().model_dump_json()), 10)
    scores = [{"step": 5 * k, "epoch": k, "top1": 50.0 + k, "top5": 90.0, "images": 9} for k in (1, 2)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    result = json.loads(command("report", run, "--json").out)
    text, html = checked(run / "run-report.html")
    assert result["runs"][0]["kind"] == "Fine-tuning"
    assert result["runs"][0]["evaluations"] == {"best top-1 on val": 52.0}
    assert "Reconstruction" not in result["sections"]
    assert 'alt="accuracy over the run"' in html
    assert "52.00" in text


def test_robustness_and_segmentation_are_shown(tmp_path, command):
    run = write_run(tmp_path / "run", {"data": {"stride": None}, "train": {"epochs": 2, "global_batch": 8}}, 10)
    scores = [{"step": 10, "epoch": 2, "miou": 41.25, "macc": 50.0, "aacc": 70.0}]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    shutil.copy(_picture(tmp_path / "p.png"), run / "predictions.png")
    corrupted = {"images": "computed", "top1": {"fog": {"1": 61.5}}, "mean_error": 38.5, "mce": None}
    found = {"evaluation": "robustness", "sets": {"clean": {"top1": 75.5}}, "corruptions": corrupted}
    (run / "evaluations" / "robustness").mkdir(parents=True)
    (run / "evaluations" / "robustness" / "results.json").write_text(json.dumps(found))
    result = json.loads(command("report", run, "--json").out)
    text, html = checked(run / "run-report.html")
    assert result["runs"][0]["kind"] == "Segmentation training"
    named = {"robustness top-1 on clean": 75.5, "robustness mean corruption error": 38.5, "best mIoU on val": 41.25}
    assert result["runs"][0]["evaluations"] == named
    assert base64.b64encode((run / "predictions.png").read_bytes()).decode() in html
    assert 'alt="robustness"' in html
    assert "corruptions.top1.fog.1 61.5" in text


def _picture(file):
    Image.new("RGB", (30, 20), "red").save(file)
    return file


def test_what_is_damaged_is_left_out_and_named(evaluated, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    (run / "evaluations" / "knn" / "results.json").write_text("{")
    (run / "evaluations" / "analysis" / "layers.json").write_text('{"analysis": "layers", "found": {"one": {}}}')
    (run / "evaluations" / "analysis" / "relevance-dark.png").write_bytes(b"")
    (run / "evaluations" / "analysis" / "cka.png").unlink()
    command("report", run)
    text, _ = checked(run / "run-report.html")
    assert "Not readable, and left out: evaluations/knn/results.json" in text
    assert "k-NN top-1 (k" not in text
    whole = {analysis.name for analysis in stored_analyses(read_runs([str(run)])[0])}
    assert whole == {"attention-distance", "maps", "spectrum"}


def test_what_is_no_run_is_one_line(evaluated, command, tmp_path):
    def refused(*arguments):
        done = command("report", *arguments, code=2)
        assert done.out == ""
        (line,) = done.err.splitlines()
        return line

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "expected metrics of at least one step, found no such file" in refused(evaluated, empty)
    assert "found no such file" in refused(tmp_path / "nothing")
    bare = write_run(tmp_path / "bare", MAE, 3)
    (bare / "recipe.yaml").write_text("a: [")
    assert "expected the recipe of the run, found no readable YAML" in refused(bare)
    (bare / "recipe.yaml").unlink()
    assert "expected the recipe of the run, found no such file" in refused(bare)
    assert "found a folder" in refused(evaluated, "-o", tmp_path)
    (tmp_path / "file").write_text("")
    assert "found a file among them" in refused(evaluated, "-o", tmp_path / "file" / "page.html")
    assert list(empty.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "empty", "file"]
