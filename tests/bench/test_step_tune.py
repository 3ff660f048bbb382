"""bench step --tune: which trials are made, which is chosen, and that a trial really runs out of memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lut_ds.bench.step import Options, make_tasks, run_task, step_recipe
from lut_ds.bench.step_guard import judge
from lut_ds.bench.step_run import Task, measure_within
from lut_ds.bench.step_tune import describe_step_tuning, micro_batches, search, tune_step
from lut_ds.cli import main
from lut_ds.errors import UserError
from tests.bench.test_step_bench import TINY

FULL = {"out_of_memory": 1.0}


def trials(speeds: dict[tuple[int, bool, bool], float | None], sizes: list[int]) -> list[dict[str, Any]]:
    """A search in which (micro-batch, compiled, checkpointing) has a speed, or None where memory ends."""

    def attempt(settings: dict[str, Any]) -> dict[str, Any]:
        key = (settings["micro_batch"], settings.get("compile", False), "activation_checkpointing" in settings)
        speed = speeds[key]
        return {**settings, **({"images_per_s": speed} if speed is not None else FULL)}

    return search(sizes, False, attempt)


def test_sizes_are_whole_parts_of_the_batch() -> None:
    assert micro_batches(16) == [2, 4, 8, 16]
    assert micro_batches(512) == [8, 16, 32, 64, 128, 256, 512]
    assert micro_batches(24) == [3, 6, 12, 24]
    assert micro_batches(7) == [7]


def test_stops_when_speed_does_not_grow() -> None:
    speeds = {(2, False, False): 10.0, (4, False, False): 15.0, (8, False, False): 15.2, (16, False, False): 15.1}
    found = trials({**speeds, (4, True, False): 12.0}, [2, 4, 8, 16, 32])
    assert [trial["micro_batch"] for trial in found] == [2, 4, 8, 16, 4]
    assert found[-1]["compile"] is True


def test_tries_recomputing_where_memory_ended() -> None:
    speeds = {(2, False, False): 10.0, (4, False, False): 15.0, (8, False, False): None, (4, True, False): 20.0}
    found = trials({**speeds, (8, True, True): 30.0}, [2, 4, 8, 16])
    assert found[-1] == {"micro_batch": 8, "compile": True, "activation_checkpointing": True, "images_per_s": 30.0}
    nothing = trials({(2, False, False): None, (2, False, True): None}, [2, 4])
    assert len(nothing) == 2


def test_chooses_and_says_what_to_paste() -> None:
    recipe = step_recipe("lut_vits16", None, TINY, 8)
    speed = {2: 10.0, 4: 20.0, 8: 20.3}

    def run(task: Task) -> dict[str, float]:
        assert task.recipe["train"]["global_batch"] == 8
        assert task.memory == 2**30
        return {"images_per_s": speed[task.recipe["train"]["micro_batch"]], "step_ms": 1.0, "memory_mib": 5.0}

    report = tune_step(recipe, Options(batch=8, device="cpu", threads=1), 1.0, run)
    assert report["overrides"] == ["train.micro_batch=4"]  # 8 is faster by less than 3 %
    assert describe_step_tuning(report).endswith("best: train.micro_batch=4")
    with pytest.raises(UserError, match=r"not even train\.micro_batch=2 fits into 1\.0 GiB"):
        tune_step(recipe, Options(batch=8, device="cpu", threads=1), 1.0, lambda task: FULL)


@pytest.mark.slow
def test_a_trial_that_does_not_fit_is_a_result() -> None:
    recipe = step_recipe("lut_vits16", None, [*TINY, "method.head_hidden=4096", "model.width=512"], 8)
    task = make_tasks(recipe, Options(batch=8, steps=1, warmup=1, threads=1), "cpu")[0]["ours"]
    assert run_task(replace(task, memory=20 * 2.0**20)) == FULL


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=("torch", "CUDA", "Triton", "cuBLAS"),
)
def test_memory_may_end_in_any_library(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = step_recipe("lut_vits16", None, TINY, 8)
    task = make_tasks(recipe, Options(batch=8), "cpu")[0]["ours"]
    raised = iter([error, RuntimeError("CUDA error: an illegal memory access was encountered")])

    def run_out(task: Task) -> None:
        raise next(raised)

    monkeypatch.setattr("lut_ds.bench.step_run.measure", run_out)
    assert measure_within(task) == FULL
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure_within(task)


def test_refuses_what_does_not_go_together(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["bench", "step", "lut_vits16", "--memory", "2"]) == 2
    assert "only --tune has a limit" in capsys.readouterr().err
    assert main(["bench", "step", "lut_vits16", "--tune", "--peers"]) == 2
    assert "leave out --peers" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "step", "lut_vits16", "--tune"]) == 2
    assert "expected one process" in capsys.readouterr().err


def test_the_guard_tells_noise_from_a_slower_step() -> None:
    def ratios(fp32: float, bf16: float) -> dict[str, Any]:
        return {"ratios": {k: {"median": v, "min": v, "max": v} for k, v in (("fp32", fp32), ("bf16", bf16))}}

    lines, bad = judge(ratios(1.3, 0.9), ratios(1.4, 1.1))
    assert not bad
    assert lines[0].endswith("committed 1.40: ok")
    assert lines[1].endswith("committed 1.10: slower")
    lines, bad = judge(ratios(1.3, 0.6), ratios(1.4, 1.1))
    assert bad
    assert "FAR OUT" in lines[1]
