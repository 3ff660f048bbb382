"""Which side runs: the table, the switch, the environment variable."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from lut_kernels import OPS, choice, kernels_mode
from lut_kernels.attention import LIBRARY
from lut_kernels.attention_launch import launch_forward
from lut_kernels.dispatch import matches, rules, table, tile
from lut_kernels.runtime import record_launches

CPU = torch.device("cpu")
ATTENTION_CHOICES = {"triton", "sdpa", "plain", *LIBRARY}


def attention_shape(op: str) -> tuple[int, ...]:
    return (50, 64) if op == "attention" else ()


@pytest.mark.parametrize("op", OPS)
def test_a_cpu_never_gets_triton(op: str) -> None:
    for mode, dtype in itertools.product(("auto", "torch"), (torch.float32, torch.bfloat16, torch.float64)):
        with kernels_mode(mode):
            assert choice(op, "cpu", dtype, *attention_shape(op)) != "triton"
    with kernels_mode("triton"), pytest.raises(ValueError, match="expected auto or torch"):
        choice(op, CPU, torch.float32, *attention_shape(op))


def test_cpu_attention_by_dtype_and_length() -> None:
    assert choice("attention", CPU, torch.bfloat16, 197, 64) == "plain"
    assert choice("attention", CPU, torch.float32, 197, 64) == "sdpa"
    assert choice("attention", CPU, torch.bfloat16, 1025, 64) == "sdpa"
    assert choice("attention", CPU, torch.float32, 50, 64, training=False) == "sdpa"


def test_modes_nest_and_end() -> None:
    with kernels_mode("triton"):
        with kernels_mode("torch"):
            assert choice("gather_patches", CPU, torch.float32) == "torch"
        with pytest.raises(ValueError, match="found triton"):
            choice("gather_patches", CPU, torch.float32)
    assert choice("gather_patches", CPU, torch.float32) == "torch"


def test_unknown_names() -> None:
    with (
        pytest.raises(ValueError, match="kernels_mode: expected one of auto, torch, triton, found 'fast'"),
        kernels_mode("fast"),
    ):
        raise AssertionError("not reached")
    with pytest.raises(ValueError, match="op: expected one of gather_patches"):
        choice("gather", CPU, torch.float32)


@pytest.mark.parametrize("value, message", [("fast", "LUT_KERNELS: expected one of"), ("triton", "TRITON_INTERPRET=1")])
def test_environment_variable(value: str, message: str) -> None:
    code = (
        "import sys, lut_kernels, torch; assert 'lut_ds' not in sys.modules and 'deepspeed' not in sys.modules;"
        "lut_kernels.attention(torch.zeros(1, 2, 6), 1)"
    )
    environment = {**os.environ, "LUT_KERNELS": value}
    environment.pop("TRITON_INTERPRET", None)
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert message in found.stderr


@pytest.mark.parametrize("arch", ["cpu", "default", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("op", OPS)
def test_every_shape_has_a_rule_and_a_library_side(arch: str, op: str) -> None:
    for dtype, tokens, head_dim, training in itertools.product(
        ("float32", "bfloat16", "float16", "float64"), (2, 50, 1025), (32, 80), (True, False)
    ):
        found = [rule for rule in rules("choices", arch, op) if matches(rule, dtype, tokens, head_dim, training)]
        assert any(rule["use"] != "triton" for rule in found)
        assert all(rule["because"] for rule in found)
        assert {rule["use"] for rule in found} <= (ATTENTION_CHOICES if op == "attention" else {"torch", "triton"})


def test_every_kernel_has_a_tile_everywhere() -> None:
    for arch, kernel in itertools.product((80, 90, 100, 120), table()["tiles"]["default"]):
        with record_launches(f"sm_{arch}"):
            for tokens, head_dim in itertools.product((2, 64, 65, 1025), (12, 64, 128)):
                assert min(tile(kernel, CPU, torch.bfloat16, tokens, head_dim).values()) >= 1


def test_up_to_includes_its_own_length() -> None:
    assert matches({"up_to": 64}, "bfloat16", 64, 64, True)
    assert not matches({"up_to": 64}, "bfloat16", 65, 64, True)


def test_fp32_products_follow_torch() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            with record_launches("sm_90") as noted:
                launch_forward(torch.empty(1, 4, 48, device="meta"), 1, False)
            assert noted.launches[0].constants["PRECISION"] == expected
    finally:
        torch.set_float32_matmul_precision(before)
