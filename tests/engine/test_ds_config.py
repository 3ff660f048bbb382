"""DeepSpeed's configuration: what a user may set, what is refused, and that the README explains all of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_ds.config import Recipe, load_recipe
from lut_ds.engine.ds_config import (
    OWNED,
    SCHEMA,
    config_folder,
    load_ds_config,
    resolve_ds_config,
    zero_stage,
)
from lut_ds.errors import UserError

OVERRIDE = "train.deepspeed_override."
ZERO = OVERRIDE + "zero_optimization."
SHIPPED = sorted(path.stem for path in config_folder().glob("*.json"))
LEAVES = [(section, key) for section, keys in SCHEMA.items() if isinstance(keys, dict) for key in keys] + [
    ("", key) for key, keys in SCHEMA.items() if not isinstance(keys, dict)
]


def demo(*overrides: str) -> Recipe:
    return load_recipe("demo", overrides)


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_ds_config(demo(*overrides))
    return str(caught.value)


def readme_rows() -> dict[str, str]:
    """Text beside each `key` in the first column of a table of the README."""
    lines = (config_folder() / "README.md").read_text().splitlines()
    rows = [re.match(r"\| `([\w.]+)(?<!json)` \|(.*)", line) for line in lines]
    return {row[1]: row[2] for row in rows if row}


def test_the_readme_explains_every_key() -> None:
    rows = readme_rows()
    prefixes = {"comms_logger": "comms_logger.", "flops_profiler": "flops_profiler."}
    for section, key in LEAVES:
        name = prefixes.get(section, "") + key
        assert len(rows[name].strip(" |")) > 10, name
    for key, instead in OWNED.items():
        assert all(word in rows[key] for word in re.findall(r"\w+\.\w+", instead)), key


def test_the_readme_explains_nothing_that_is_not_there() -> None:
    known = {f"{section}.{key}" for section, key in LEAVES} | {key for _, key in LEAVES} | set(SCHEMA) | set(OWNED)
    assert set(readme_rows()) <= known


def test_the_readme_names_every_file() -> None:
    text = (config_folder() / "README.md").read_text()
    assert all(f"`{name}.json`" in text for name in SHIPPED)


def test_deepspeed_knows_every_key() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    assert set(SCHEMA["zero_optimization"]) <= {field.alias or name for name, field in fields.items()}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_valid(name: str) -> None:
    config = load_ds_config(demo(f"train.deepspeed={name}"))
    stage = {"cpu": 1, "zero3_zeropp": 3}.get(name, int(name[4]) if name.startswith("zero") else None)
    assert zero_stage(config) == stage
    assert not config["zero_optimization"].get("round_robin_gradients")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LEAVES), st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=3))
def test_an_unknown_key_at_any_depth_is_refused(leaf: tuple[str, str], tail: str) -> None:
    section, key = leaf
    typed = key + tail
    if typed in (SCHEMA[section] if section else {**SCHEMA, **OWNED}):
        return
    where = f"{section}.{typed}" if section else typed
    text = refused(f"{OVERRIDE}{where}=1")
    assert f"unknown key {where}" in text
    assert "did you mean" in text


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("grad_cliping", "gradient_clipping"),
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation.stage", "zero_optimization"),
        ("zero_optimization.stagee", "zero_optimization.stage"),
        ("zero_optimization.overlap_com", "zero_optimization.overlap_comm"),
        ("comms_logger.verbos", "comms_logger.verbose"),
    ],
)
def test_known_slips(typed: str, meant: str) -> None:
    assert refused(f"{OVERRIDE}{typed}=1").endswith(f"did you mean {meant}?")


def test_a_key_that_is_near_none_lists_the_known_ones() -> None:
    assert "known keys: zero_optimization, " in refused(f"{OVERRIDE}elasticity.enabled=true")
    assert "known keys: stage, " in refused(f"{ZERO}offload_optimizer.device=cpu")


@pytest.mark.parametrize("key", OWNED)
def test_what_the_recipe_decides_is_refused_in_the_file_too(key: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({key: 1}))
    for overrides in ([f"{OVERRIDE}{key}=1"], [f"{OVERRIDE}{key}.enabled=true"], [f"train.deepspeed={path}"]):
        text = refused(*overrides)
        assert f"{key} is decided by the recipe" in text
        assert OWNED[key] in text


WRONG = [
    ("zero_optimization", "3"),
    ("zero_optimization", "[1]"),
    ("zero_optimization", ""),
    ("zero_optimization.stage", "4"),
    ("zero_optimization.stage", "-1"),
    ("zero_optimization.stage", "two"),
    ("zero_optimization.stage", "1.5"),
    ("zero_optimization.stage", "null"),
    ("zero_optimization.stage.x", "1"),
    ("zero_optimization.reduce_bucket_size", "0"),
    ("zero_optimization.reduce_bucket_size", "many"),
    ("zero_optimization.overlap_comm", "3"),
    ("zero_optimization.round_robin_gradients", "true"),
    ("communication_data_type", "banana"),
    ("communication_data_type", "3"),
    ("prescale_gradients", "maybe"),
    ("gradient_predivide_factor", "abc"),
    ("gradient_predivide_factor", "0"),
    ("comms_logger", "true"),
    ("comms_logger.enabled", "banana"),
    ("comms_logger.prof_ops", "3"),
    ("flops_profiler.profile_step", "x"),
    ("flops_profiler.enabled", "3"),
    ("wall_clock_breakdown", "7"),
    ("memory_breakdown", "{}"),
]


@pytest.mark.parametrize("key, value", WRONG)
def test_a_wrong_value_is_one_line_naming_file_and_key(key: str, value: str) -> None:
    text = refused(f"{OVERRIDE}{key}={value}")
    assert text.startswith("DeepSpeed configuration cpu.json: ")
    assert key.removesuffix(".x") in text


def test_combinations_that_train_wrongly() -> None:
    assert "memory_efficient_linear must be false" in refused(f"{ZERO}stage=3")
    assert "memory_efficient_linear must be false" in refused(
        "train.deepspeed=zero3", f"{ZERO}memory_efficient_linear=true"
    )
    assert "keeps no fp32 masters" in refused(f"{ZERO}stage=0", "precision.compute=bf16")
    assert "keeps no fp32 masters" in refused("train.deepspeed=zero0", "precision.compute=bf16")
    assert "reduce_scatter" in refused(f"{OVERRIDE}gradient_predivide_factor=2.0")
    assert zero_stage(load_ds_config(demo(f"{ZERO}stage=0"))) == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", "null", '"x"', b"\xff{}", '{"zero_optimization": {"stage": 1, "stage": 2}}']
)
def test_a_file_that_is_no_configuration_is_one_line_naming_it(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    assert "own.json" in refused(f"train.deepspeed={path}")


@pytest.mark.parametrize("name", ["zero9", "zero2.json", "/", "nowhere/own.json"])
def test_a_file_that_is_not_there(name: str) -> None:
    text = refused(f"train.deepspeed={name}")
    assert repr(name) in text
    assert "zero1, zero2, zero3" in text


def test_overrides_are_merged_into_the_file_not_over_it(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 1, "overlap_comm": true}, "wall_clock_breakdown": true}')
    config = load_ds_config(demo(f"train.deepspeed={path}", f"{ZERO}stage=2"))
    assert config == {"zero_optimization": {"stage": 2, "overlap_comm": True}, "wall_clock_breakdown": True}


def resolved(*overrides: str, world_size: int = 2) -> dict[str, Any]:
    recipe = demo(*overrides)
    return resolve_ds_config(load_ds_config(recipe), recipe, 16, 4, world_size)


def test_one_rank_has_no_communication_to_overlap() -> None:
    """DeepSpeed would wait for the device after each backward pass, to send nothing; stage 3 fetches by the same switch."""
    for stage, on_one_rank in ((1, False), (2, False), (3, True)):
        name = f"train.deepspeed=zero{stage}"
        assert resolved(name)["zero_optimization"]["overlap_comm"] is True
        assert resolved(name, world_size=1)["zero_optimization"]["overlap_comm"] is on_one_rank


def test_no_clipping_unless_asked() -> None:
    """DeepSpeed clips at 1.0 when the key is absent."""
    assert resolved()["gradient_clipping"] == 0.0
    assert resolved("optim.clip_grad=0.5")["gradient_clipping"] == 0.5


def test_batch_and_precision_come_from_the_recipe() -> None:
    fp32, bf16 = resolved(), resolved("precision.compute=bf16")
    assert (fp32["train_micro_batch_size_per_gpu"], fp32["gradient_accumulation_steps"]) == (16, 4)
    assert "bf16" not in fp32
    assert bf16["bf16"]["enabled"] is True


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("clip", ["null", "0.5"])
def test_deepspeed_reads_what_we_mean(compute: str, clip: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    theirs = DeepSpeedConfig(resolved(f"precision.compute={compute}", f"optim.clip_grad={clip}"))
    assert theirs.gradient_clipping == {"null": 0.0, "0.5": 0.5}[clip]
    assert theirs.train_batch_size == 16 * 4
    assert theirs.bfloat16_config.enabled is (compute == "bf16")
    assert theirs.zero_optimization_stage == 1
