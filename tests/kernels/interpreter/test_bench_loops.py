"""The parity check and the timing loops of the GPU command, with the kernels interpreted and the host's clock."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from lut_kernels import resources
from lut_kernels.bench import run_guards
from lut_kernels.bench_parity import check_guards, check_work
from lut_kernels.bench_table import tile_rules
from lut_kernels.bench_time import time_sides, tune
from lut_kernels.bench_work import Inputs, attention_work, embed_work, gather_work, loss_work, unshuffle_work
from lut_kernels.dispatch import current_mode
from lut_kernels.guard import guarded_launches
from lut_kernels.runtime import launch
from lut_kernels.tuning import SPACE

SMALL = [
    gather_work(2, 5, 3, side=35),
    gather_work(2, 14, None, side=28),
    embed_work(2, 40, 17, 5),
    unshuffle_work(2, 7, 5, 2, training=True),
    loss_work(2, 5, 3, side=35),
    attention_work(2, 17, 2, 12, training=True),
    attention_work(1, 66, 1, 80, training=True),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.name)
def test_kernels_pass(work: Any, dtype: torch.dtype) -> None:
    found = check_work(work, "cpu", dtype)
    assert found["passed"], found["detail"]


def host_timer(calls: list[Callable[[], object]], repeats: int) -> float:
    """Microseconds of one call, once over all of them."""
    assert repeats >= 3
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls) * 1e6


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.name)
def test_every_side_is_timed(work: Any) -> None:
    times = time_sides(work, "cpu", torch.float32, host_timer)
    assert set(times) == {"triton", *work.library}
    assert min(times.values()) > 0


def test_every_tile_is_tried() -> None:
    todo = [("embed_tokens", embed_work(1, 40, 17, 5)), ("unshuffle_tokens_backward", unshuffle_work(1, 7, 5, 2, True))]
    tuned = tune("cpu", todo, host_timer)
    assert [entry["tile"] for entry in tuned] == [tile for kernel, _ in todo for tile in SPACE[kernel]]
    rules = tile_rules(tuned)
    fastest = min((entry for entry in tuned if entry["kernel"] == "embed_tokens"), key=lambda entry: entry["time_us"])
    assert rules["embed_tokens"] == [{"tile": fastest["tile"]}]


def test_a_wrong_kernel_fails() -> None:
    work = embed_work(2, 8, 17, 5)

    def off_by_one_value(inputs: Inputs) -> torch.Tensor:
        out = work.call(inputs).clone()
        if current_mode() == "triton":
            out[0, 0, 0] += 0.5
        return out

    assert not check_work(dataclasses.replace(work, call=off_by_one_value), "cpu", torch.float32)["passed"]


def test_a_value_that_is_never_written_fails() -> None:
    work = embed_work(2, 8, 17, 5)

    def unwritten(inputs: Inputs) -> torch.Tensor:
        out = work.call(inputs).clone()
        if current_mode() == "triton":
            out[1, 2] = float("nan")
        return out

    assert not check_work(dataclasses.replace(work, call=unwritten), "cpu", torch.float32)["passed"]


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.name)
def test_kernels_leave_guard_zones_alone(work: Any) -> None:
    assert check_guards(work, "cpu", torch.float16) == []


@triton.jit
def _copy_kernel(source, target, SHIFT: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, SIZE)
    tl.store(target + place, tl.load(source + place + SHIFT))


def _copy(inputs: Inputs, shift: int, size: int) -> torch.Tensor:
    target = torch.zeros(32)[:8]  # what lies behind it is ours too
    launch(_copy_kernel, 1, target, inputs["x"], target, SHIFT=shift, SIZE=size)
    return target


@pytest.mark.parametrize(
    "shift, size, fault",
    [(0, 8, None), (0, 16, "_copy_kernel: wrote outside its tensor 1"), (1, 8, "depends on memory around a tensor")],
)
def test_guard_zones_show_what_is_outside(
    shift: int, size: int, fault: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    work = dataclasses.replace(
        embed_work(1, 8, 4, 2),
        make=lambda device, dtype, seed: {"x": torch.arange(32.0)[:8]},
        call=lambda inputs: _copy(inputs, shift, size),
        leaves=(),
    )
    found = run_guards("cpu", [work], torch.float32)
    assert found["passed"] is (fault is None)
    assert fault is None or fault in found["faults"][0]
    assert ("MEMORY" in capsys.readouterr().out) is (fault is not None)


def test_guarded_launches_keep_strides_and_saved_inputs() -> None:
    rows = torch.zeros(3, 8)[:, :4]
    source = torch.arange(4.0)
    with guarded_launches(0xFF) as faults:
        launch(_copy_kernel, 1, rows, source, rows, SHIFT=0, SIZE=4)
    assert faults == []
    assert rows.tolist() == [[0.0, 1.0, 2.0, 3.0], [0.0] * 4, [0.0] * 4]
    with guarded_launches(0xFF) as faults:
        launch(_copy_kernel, 1, rows, torch.arange(8.0), rows, SHIFT=0, SIZE=8)  # into the gap between two rows
    assert faults == ["_copy_kernel: wrote outside its tensor 1"]
    assert source._version == 0


def test_resources_refuses_an_interpreting_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert resources.main(["--check"]) == 2
    assert "unset it" in capsys.readouterr().err
