"""The plan's traffic and states against counted ones: real steps of the engine on 2 and 4 ranks, in every ZeRO stage."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from lut_ds.bench.planner.traffic import traffic
from lut_ds.config import parse_recipe
from lut_ds.engine.ds_config import load_ds_config
from lut_ds.engine.memory import memory
from tests.engine.launching import run_ranks
from tests.engine.tiny import tiny_tree

GLOBAL_BATCH, ACCUMULATION = 16, 2
# Changes of the DeepSpeed file by name: what is fetched twice, what is reduced to its owner, what is sent in fp32.
CHANGES: dict[str, dict[str, Any]] = {
    "fp32_zero0": {},
    "fp32_zero1": {},
    "fp32_zero2": {},
    "fp32_zero3": {"stage3_param_persistence_threshold": 100},
    "bf16_zero1": {"reduce_bucket_size": 4000},
    "bf16_zero2": {"reduce_bucket_size": 4000},
    "bf16_zero3": {"stage3_param_persistence_threshold": 100},
    "bf16_zero3_again": {
        "stage3_param_persistence_threshold": 100,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
    # A tiny model's share of the shipped distances, so that it is fetched as a ViT-H is.
    "bf16_zero3_far": {
        "stage3_param_persistence_threshold": 100,
        "stage3_max_reuse_distance": 40_000,
        "stage3_prefetch_bucket_size": 2_000,
    },
    "checkpointing_zero3": {
        "stage3_param_persistence_threshold": 100,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
    "bf16_zero2_owners": {"use_multi_rank_bucket_allreduce": False},
    "mae_zero1": {},
}
MORE = ("bf16_zero3_again", "bf16_zero3_far", "checkpointing_zero3", "bf16_zero2_owners", "mae_zero1")
LAUNCHES = [
    pytest.param((2, ("fp32_zero0", "fp32_zero2", "bf16_zero1", "bf16_zero2", "bf16_zero3")), id="2ranks"),
    pytest.param((2, MORE), id="2ranks-more", marks=pytest.mark.slow),
    pytest.param((4, ("bf16_zero3",)), id="4ranks", marks=pytest.mark.slow),
]


def tree(name: str, world_size: int) -> dict[str, Any]:
    """A tiny recipe of that name."""
    stage = next(word for word in name.split("_") if word.startswith("zero"))
    made = tiny_tree(deepspeed=stage, micro_batch=GLOBAL_BATCH // ACCUMULATION // world_size)
    if CHANGES[name]:
        made["train"]["deepspeed_override"] = {"zero_optimization": CHANGES[name]}
    made["train"]["activation_checkpointing"] = name.startswith("checkpointing")
    compute = "bf16" if name.startswith("bf16") else "fp32"
    made["precision"] = {"compute": compute, "teacher": compute}
    if name.startswith("mae"):
        made["method"] = {"name": "mae"}
    return made


@pytest.fixture(scope="module", params=LAUNCHES)
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """By case, what each rank counted."""
    world_size, names = request.param
    cases = {name: tree(name, world_size) for name in names}
    return run_counting(cases, world_size, tmp_path_factory.mktemp("counted"))


def run_counting(cases: dict[str, dict], world_size: int, folder: Path) -> dict[str, list[dict]]:
    """By case, what each rank counted."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.bench.counting_worker", str(folder / "cases.json"), str(folder / "out")]
    run_ranks(command, world_size)
    ranks = [json.loads((folder / f"out.{rank}").read_text()) for rank in range(world_size)]
    return {name: [rank[name] for rank in ranks] for name in cases}


def planned_bytes(name: str, world_size: int) -> dict[str, float]:
    """By kind and operation, as the worker names them."""
    recipe = parse_recipe(tree(name, world_size), name)
    planned: dict[str, float] = defaultdict(float)
    for kind, collective in traffic(recipe, load_ds_config(recipe), world_size, ACCUMULATION).items():
        in_step = kind == "small weights" or (kind == "weights" and collective.phase == "step")
        planned[f"{'step weights' if in_step else kind}: {collective.operation}"] += collective.payload
    return planned


def planned_states(name: str, world_size: int) -> dict[str, float]:
    """Bytes of a rank by part."""
    recipe = parse_recipe(tree(name, world_size), name)
    assert recipe.train.micro_batch is not None
    held = memory(recipe, load_ds_config(recipe), world_size, recipe.train.micro_batch, ACCUMULATION, "cpu")
    return {**held.states, "gradients": held.backward["gradients"]}


def test_what_collectives_are_given(counted: dict[str, list[dict]]) -> None:
    for name, ranks in counted.items():
        planned = planned_bytes(name, len(ranks))
        for rank in ranks:
            assert set(rank["sent"]) == set(planned), name
            for kind, found in rank["sent"].items():
                assert planned[kind] == pytest.approx(found, rel=0.01), (name, kind)


def test_what_a_rank_holds(counted: dict[str, list[dict]]) -> None:
    for name, ranks in counted.items():
        planned = planned_states(name, len(ranks))
        for part in ranks[0]["held"]:
            found = max(rank["held"][part] for rank in ranks)
            assert planned[part] == pytest.approx(found, rel=0.02), (name, part)
