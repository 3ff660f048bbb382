"""The GPU command below the GPU: what it runs, the floors, and how times become dispatch rules."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from lut_kernels import bench, resources
from lut_kernels.bench_table import attention_rules, simple_rules, tile_rules, updated, without_spills, write
from lut_kernels.bench_time import Ceiling, floor_us, time_sides, tuned_work
from lut_kernels.bench_work import Work, attention_work, parity_work, step_work, transfer_work
from lut_kernels.dispatch import matches, table
from lut_kernels.tuning import SPACE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == ["bench: needs a CUDA device, found none; nothing was measured"]


def test_a_library_that_fails_at_a_shape_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("cuDNN error: no plan\nand more")

    def double(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return 2 * inputs["x"]

    work = Work(
        "attention", "shape", lambda *_: {"x": torch.ones(2)}, double, (), 1, library={"cudnn": fails, "sdpa": double}
    )
    found = time_sides(work, "cpu", torch.float32, lambda calls, _: float(len([call() for call in calls])))
    assert set(found) == {"triton", "sdpa"}
    assert capsys.readouterr().out == "side left out: shape cudnn: cuDNN error: no plan\n"
    entry = {"op": "attention", "dtype": "bfloat16", "head_dim": 64, "training": True, "tokens": 50}
    times = [{"triton": 3.0, "cudnn": 1.0, "sdpa": 2.0}, {"triton": 3.0, "sdpa": 2.0}]
    (rule,) = attention_rules([{**entry, "times_us": each} for each in times], "here")
    assert rule["use"] == "sdpa"  # fails for no batch size


def named(prefix: str) -> Work:
    """The first operator of a 256-image step whose name starts so."""
    return next(work for work in step_work(256) if work.name.startswith(prefix))


def test_bytes_and_flops_of_vit_l_at_256_images() -> None:
    megabytes = 1e6
    assert named("gather B=512 P=16 49").bytes / megabytes == pytest.approx(19 + 38.5, rel=0.02)
    assert named("loss B=256 P=16").bytes / megabytes == pytest.approx(29 + 58 + 58, rel=0.01)
    assert named("unshuffle B=256 L=196").bytes / megabytes == pytest.approx(2 * (13 + 52), rel=0.02)
    student = named("attention B=512 N=50 H=16 d=64 train")
    assert student.bytes / megabytes == pytest.approx(210 + 420, rel=0.01)
    teacher = named("attention B=512 N=197 H=16 d=64 eval")
    assert teacher.bytes / megabytes == pytest.approx(827, rel=0.01)
    assert teacher.flops / 1e9 == pytest.approx(81, rel=0.01)
    # the floors the project states: 14 us, 34 us, 192 us at 4.3 TB/s and 790 TFLOP/s
    top = Ceiling(copy_tb_s=4.3, matmul_tflop_s=790)
    floors = [floor_us(work, top) for work in (named("gather B=512 P=16 49"), named("loss B=256 P=16"), teacher)]
    assert floors == pytest.approx([14, 34, 192], rel=0.05)


def test_names_are_unique_and_every_kernel_is_tuned() -> None:
    for work in (step_work(64), transfer_work(64), parity_work()):
        names = [one.name for one in work]
        assert len(names) == len(set(names))
    assert {kernel for kernel, _ in tuned_work(64)} == set(SPACE)


def entry(tokens: int, times: dict[str, float], images: int = 64) -> dict[str, object]:
    """A measured attention shape."""
    work = attention_work(images, tokens, 16, 64, training=True)
    return {
        "op": "attention", "name": work.name, "dtype": "bfloat16", "tokens": tokens, "head_dim": 64, "training": True,
        "floor_us": 1.0, "times_us": times,
    }  # fmt: skip


def used(rules: list[dict[str, object]], tokens: int) -> str:
    return next(rule["use"] for rule in rules if matches(rule, "bfloat16", tokens, 64, True))


def test_the_fastest_side_wins_and_the_library_wins_a_tie() -> None:
    measured = [
        entry(50, {"triton": 10.0, "cudnn": 14.0, "sdpa": 12.0}),
        entry(197, {"triton": 30.0, "cudnn": 20.0, "sdpa": 25.0}),
        entry(257, {"triton": 30.0, "cudnn": 30.0, "sdpa": 40.0}),
    ]
    rules = attention_rules(measured, "a card")
    assert [used(rules, tokens) for tokens in (2, 50, 51, 197, 257)] == ["triton", "triton", "cudnn", "cudnn", "cudnn"]
    assert not any(matches(rule, "bfloat16", 258, 64, True) for rule in rules)
    assert next(rule["use"] for rule in rules if rule["use"] != "triton" and rule["up_to"] == 50) == "sdpa"


def test_a_side_that_loses_at_one_batch_size_is_not_taken_for_winning_at_another() -> None:
    measured = [
        entry(50, {"triton": 10.0, "sdpa": 15.0, "cudnn": 11.0}, 64),
        entry(50, {"triton": 21.0, "sdpa": 20.0, "cudnn": 24.0}, 512),
    ]
    rules = attention_rules(measured, "a card")
    assert [rule["use"] for rule in rules] == ["cudnn"]  # 1.2 behind at worst; sdpa is 1.5


@pytest.mark.parametrize("slow_shape, expected", [(False, "triton"), (True, "torch")])
def test_one_lost_shape_hands_the_operator_to_torch(slow_shape: bool, expected: str) -> None:
    measured = [
        {"op": "embed_tokens", "name": f"embed {batch}", "times_us": {"triton": triton, "torch": 10.0}}
        for batch, triton in ((64, 5.0), (256, 12.0 if slow_shape else 6.0))
    ]
    assert simple_rules("embed_tokens", measured, "a card")[0]["use"] == expected


def test_tiles_by_head_dim_and_length() -> None:
    tuned = [
        {"kernel": kernel, "tokens": tokens, "head_dim": 64, "tile": {"rows": rows}, "time_us": time}
        for kernel, tokens, rows, time in (
            ("attention_forward", 197, 64, 9.0),
            ("attention_forward", 197, 128, 8.0),
            ("attention_forward", 50, 64, 3.0),
            ("attention_forward", 50, 32, 4.0),
        )
    ]
    rules = tile_rules(tuned)["attention_forward"]
    assert [(rule["up_to"], rule["tile"]["rows"]) for rule in rules] == [(50, 64), (197, 128)]


def test_a_tile_that_spills_is_not_chosen() -> None:
    space = json.loads(resources.SPACE_PATH.read_text())
    tuned = [
        {"kernel": "attention_backward_kv", "tokens": 197, "head_dim": head_dim, "tile": tile, "time_us": 1.0}
        for head_dim, tile in itertools.product((32, 80), SPACE["attention_backward_kv"])
    ]
    for arch in ("sm_80", "sm_90", "sm_100"):
        kept = without_spills(tuned, arch, space)
        for entry in tuned:
            where = f"{arch} attention_backward_kv d={entry['head_dim']} "
            names = [name for name in space if name.startswith(where) and name.endswith(json.dumps(entry["tile"]))]
            assert names
            assert (entry in kept) == (not any(space[name]["spilled"] for name in names))
    assert without_spills(tuned, "sm_120", space) == tuned


def test_the_new_table_is_complete_and_survives_a_second_measurement(tmp_path: Path) -> None:
    measured = [entry(50, {"triton": 10.0, "cudnn": 14.0})]
    tuned = [{"kernel": "attention_forward", "tokens": 50, "head_dim": 64, "tile": {"rows": 64}, "time_us": 1.0}]
    first = updated(table(), "sm_90", measured, tuned, "first")
    assert "sm_90" not in table()["tiles"]
    second = updated(first, "sm_90", [entry(50, {"triton": 15.0, "cudnn": 14.0})], [], "second")
    attention = second["choices"]["sm_90"]["attention"]
    assert used(attention, 50) == "cudnn"
    assert not any("first" in rule["because"] for rule in attention)
    for dtype, tokens in itertools.product(("float32", "bfloat16"), (50, 1025)):
        assert any(matches(rule, dtype, tokens, 64, True) and rule["use"] != "triton" for rule in attention)
    assert second["tiles"]["sm_90"]["attention_forward"][0]["tile"] == {"rows": 64}
    assert len(second["tiles"]["sm_90"]["attention_forward"]) > 1
    write(second, tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == second
