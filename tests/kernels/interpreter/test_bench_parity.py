"""The parity check of the GPU command, with the kernels interpreted."""

import dataclasses
from typing import Any

import pytest
import torch
from lut_kernels import resources
from lut_kernels.bench_parity import check_work
from lut_kernels.bench_work import Inputs, attention_work, embed_work, gather_work, loss_work, unshuffle_work
from lut_kernels.dispatch import current_mode

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


def test_resources_refuses_an_interpreting_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert resources.main(["--check"]) == 2
    assert "unset it" in capsys.readouterr().err
