"""Loss spikes of a real run: a batch of noise among flat images, and what each setting of `guard.spike` makes of it."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lut_ds.data.order import SampleOrder
from lut_ds.engine.guards.spans import SkippedSpans, Span
from lut_ds.tracking import read_events, read_metrics
from tests.engine.guards.modes_worker import MODES
from tests.engine.launching import PATIENCE, run_ranks, start_ranks
from tests.engine.tiny import tiny_tree

BATCH, STEPS, SPIKE, SEED = 16, 20, 14, 3
SAVE_EVERY = 5
USUAL = 1.5  # no loss of an ordinary batch is above
VOLATILE = ("images_per_s", "data_wait")


def write_images(folder: Path) -> None:
    """Flat pictures with a little noise, but black and white noise in all samples of step `SPIKE`."""
    folder.mkdir()
    count, rng = BATCH * 24, np.random.default_rng(0)
    spiky = SampleOrder(count, SEED).samples(0, np.arange(BATCH * (SPIKE - 1), BATCH * SPIKE)).tolist()
    for i in range(count):
        flat = 120 + 8 * rng.standard_normal(3) + 4 * rng.standard_normal((16, 16, 3))
        pixels = rng.choice([0, 255], (16, 16, 3)) if i in spiky else np.clip(flat, 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:04d}.png")


def write_recipe(folder: Path, data: Path, **guard: Any) -> Path:
    tree = tiny_tree(global_batch=BATCH, max_steps=STEPS)
    tree["method"]["norm_pix"] = False  # the loss then rises with the contrast
    tree["data"] = {"path": str(data), "threads": 1}
    tree["run"] = {"dir": str(folder / "run"), "log_every": SAVE_EVERY, "save_every": SAVE_EVERY, "seed": SEED}
    tree["guard"] = {"spike_window": 8, **guard}
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "lut_ds", "pretrain", str(recipe), "--json"]


def events(run: Path) -> list[dict[str, Any]]:
    """The guards' events of a run."""
    return [e for e in read_events(run / "events.jsonl") if e["event"] in ("spike", "rewind", "bad_steps")]


def curve(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in VOLATILE} for r in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spiky") / "images"
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def rewound(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run of two ranks that rewinds: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("rewound")
    (out, _), _ = run_ranks(command(write_recipe(folder, images, spike="rewind")), 2)
    return folder / "run", json.loads(out)


@pytest.mark.slow
def test_a_spike_is_rewound_and_its_data_passed_over(rewound: tuple[Path, dict[str, Any]]) -> None:
    run, result = rewound
    records = curve(run)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert all(r["loss"] < USUAL and r["applied"] for r in records)
    assert result["events"] == {"rewind": 1}
    (event,) = events(run)
    assert (event["event"], event["step"], event["back_to"]) == ("rewind", SPIKE, 10)
    assert event["loss"] > event["limit"]
    assert len(event["images"]) == BATCH // 2  # rank 0's
    assert SkippedSpans.read(run) == SkippedSpans((Span(10, SPIKE - 10),), 1)
    newest = json.loads((run / "checkpoints" / "step_00000020" / "state.json").read_text())
    assert newest["guard"]["skipped"]["spans"] == [{"at": 10, "length": SPIKE - 10}]


@pytest.mark.slow
def test_killed_right_after_a_rewind_it_continues_bit_identically(
    rewound: tuple[Path, dict[str, Any]], images: Path, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path, images, spike="rewind"), tmp_path / "run"
    processes = start_ranks(command(recipe), 2)
    deadline = time.monotonic() + PATIENCE
    while True:
        ended = any(process.poll() is not None for process in processes)  # before the look at what they wrote
        if (run / "skipped.json").exists():
            break
        assert not ended
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    (out, _), _ = run_ranks(command(recipe), 2)
    assert json.loads(out)["resumed_from"] >= 10
    assert curve(run) == curve(rewound[0])


@pytest.fixture(scope="module")
def modes(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The run under each of `MODES` on one rank: the folder of their run folders, and how each ended."""
    folder = tmp_path_factory.mktemp("modes")
    recipe = write_recipe(folder, images)
    run_ranks([sys.executable, "-m", "tests.engine.guards.modes_worker", str(recipe), str(folder / "out.json")], 1)
    found = json.loads((folder / "out.json").read_text())
    assert set(found) == set(MODES)
    return folder, found


@pytest.mark.slow
def test_off_keeps_no_limit_and_says_nothing(modes: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, found = modes
    assert found["off"]["events"] == {}
    assert all("loss_limit" not in r and r["applied"] for r in curve(folder / "off"))


@pytest.mark.slow
def test_log_says_it_and_goes_on(modes: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, found = modes
    assert found["log"]["events"] == {"spike": 1}
    (event,) = events(folder / "log")
    assert event["step"] == SPIKE
    assert event["text"].startswith(f"step {SPIKE}: loss spike: the loss ")
    assert all(r["applied"] for r in curve(folder / "log"))
    without = [{k: v for k, v in r.items() if k != "loss_limit"} for r in curve(folder / "log")]
    assert without == curve(folder / "off")


@pytest.mark.slow
def test_skip_does_not_apply_the_step_and_counts_it(modes: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, found = modes
    records = curve(folder / "skip")
    assert [r["step"] for r in records if not r["applied"]] == [SPIKE]
    assert [r["bad_steps"] for r in records] == [0] * (SPIKE - 1) + [1] * (STEPS - SPIKE + 1)
    assert records[:SPIKE] != curve(folder / "log")[:SPIKE]  # applied there
    assert records[: SPIKE - 1] == curve(folder / "log")[: SPIKE - 1]
    assert records[SPIKE]["loss"] != curve(folder / "log")[SPIKE]["loss"]
    (event,) = events(folder / "skip")
    assert (event["event"], event["steps"], len(event["images"])) == ("bad_steps", [SPIKE], BATCH)
    assert found["skip"]["events"] == {"bad_steps": 1}


@pytest.mark.slow
def test_too_many_rewinds_end_the_run_with_its_checkpoints(modes: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, found = modes
    fault = found["too_often"]["fault"]
    assert fault.startswith(f"step {SPIKE}: the loss ")
    assert "the run went back 0 times before" in fault
    assert "guard.max_rewinds" in fault
    assert max(p.name for p in (folder / "too_often" / "checkpoints").glob("step_*")) == "step_00000010"


@pytest.mark.slow
def test_a_spike_before_the_first_checkpoint_is_not_applied(modes: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, found = modes
    assert found["too_early"]["events"] == {"spike": 1, "bad_steps": 1}
    assert not (folder / "too_early" / "skipped.json").exists()
    assert curve(folder / "too_early") == curve(folder / "skip")


@pytest.mark.slow
def test_too_many_bad_steps_end_the_run_with_a_report(modes: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    _, found = modes
    fault = found["too_many"]["fault"]
    assert fault.startswith(f"step {SPIKE}: 1 steps in a row were not applied; in the last the loss ")
    assert "at a learning rate of " in fault
    assert ".png" in fault
