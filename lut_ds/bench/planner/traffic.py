"""What a rank passes to collectives in an optimizer step, as the engine really calls them.

`tests/bench/test_counted.py` counts the tensors that reach torch's process group on 2 and 4 ranks and compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lut_ds.config import Recipe
from lut_ds.engine.activations import SIZES
from lut_ds.engine.ds_config import zero_stage
from lut_ds.engine.memory import fetched_weights, persistent, sizes

COMMUNICATION = {"fp32": 4, "bf16": 2, "fp16": 2}
# Bytes that leave a rank for each byte of the whole tensor, of W ranks in a ring.
ALL_REDUCE, GATHER = 2.0, 1.0


@dataclass(frozen=True)
class Collective:
    """One kind of exchange, over an optimizer step of a rank.

    Attributes:
        operation: of torch.distributed.
        payload: bytes of the whole tensors (of a gather, of all ranks' parts; of a reduce-scatter, before it).
        calls: how many exchanges; for gradients and weights a lower bound, from the bucket sizes.
        phase: `forward`, `backward`, `step`: what it can overlap with.
    """

    operation: str
    payload: float
    calls: float
    phase: str

    def wire(self, world_size: int) -> float:
        """Bytes that leave the rank, with a ring algorithm."""
        factor = ALL_REDUCE if self.operation == "all_reduce" else GATHER
        return factor * (world_size - 1) / world_size * self.payload


def traffic(recipe: Recipe, config: Mapping[str, Any], world_size: int, accumulation: int) -> dict[str, Collective]:
    """The exchanges of one optimizer step by name; empty for a lone rank.

    ZeRO 1 sums whole gradients once a step, ZeRO 2 after every micro-batch; both by all-reduce where
    `use_multi_rank_bucket_allreduce` is on, DeepSpeed's default: twice the bytes of a reduce-scatter.
    """
    if world_size == 1:
        return {}
    stage, zero = zero_stage(dict(config)), config.get("zero_optimization", {})
    found = _gradients(recipe, config, stage, world_size, accumulation)
    found |= _weights(recipe, zero, stage, world_size, accumulation)
    count = sizes(recipe)
    if count.teacher and stage > 0:
        averaged = count.averaged
        whole = averaged.partitions(world_size) if stage == 3 else averaged.flat(world_size)
        payload = float(whole * SIZES[recipe.precision.teacher])
        found["teacher refresh"] = Collective("all_gather", payload, count.gathered, "step")
    if count.batch_norms:
        # A mean and a variance a view, forward and again for their gradients.
        exchanges = 4 * recipe.method.views * accumulation
        payload = exchanges * 4 * sum(count.batch_norms)
        found["batch norm"] = Collective("all_reduce", payload, exchanges * len(count.batch_norms), "forward")
    metrics = 4 if count.teacher else 3
    votes = 2
    norms, each = {0: (0, 0), 1: (1, 4), 2: (1, 4), 3: (len(count.groups), 8)}[stage]
    found["guards"] = Collective("all_reduce", 4 * (metrics + votes) + norms * each, 1 + norms, "step")
    return found


def _gradients(
    recipe: Recipe, config: Mapping[str, Any], stage: int, world_size: int, accumulation: int
) -> dict[str, Collective]:
    zero, count = config.get("zero_optimization", {}), sizes(recipe)
    element = COMMUNICATION.get(config.get("communication_data_type", ""), SIZES[recipe.precision.compute])
    bucket = int(zero.get("reduce_bucket_size", 500_000_000))
    times = accumulation if stage >= 2 else 1
    calls = times * max(1, -(-count.parameters // bucket))
    if stage == 3:
        payload = count.partitions(world_size) * element * times
        return {"gradients": Collective("reduce_scatter", payload, calls, "backward")}
    together = zero.get("use_multi_rank_bucket_allreduce", True) or not zero.get("reduce_scatter", True)
    operation = "all_reduce" if stage == 0 or together else "reduce"
    phase = "backward" if stage > 0 and zero.get("overlap_comm", False) else "step"
    return {"gradients": Collective(operation, float(count.parameters * element * times), calls, phase)}


def _weights(
    recipe: Recipe, zero: Mapping[str, Any], stage: int, world_size: int, accumulation: int
) -> dict[str, Collective]:
    count, element = sizes(recipe), SIZES[recipe.precision.compute]
    if stage == 0:
        return {}
    if stage < 3:
        return {"weights": Collective("all_gather", count.flat(world_size) * element, len(count.groups), "step")}
    every = [n for group in count.groups for n in group]
    large = sum(-(-n // world_size) * world_size for n in every if not persistent(n, zero))
    small = [-(-n // world_size) * world_size for n in every if persistent(n, zero)]
    plain = sum(n for n in every if not persistent(n, zero))
    once = fetched_weights(recipe, zero).gathered * (large / plain if plain else 0.0)
    calls = max(1, round(once / max(int(zero.get("stage3_prefetch_bucket_size", 50_000_000)), 1)))
    fetches = Collective("all_gather", once * element * accumulation, calls * accumulation, "forward")
    return {
        "weights": fetches,
        "small weights": Collective("all_gather", float(sum(small) * element), len(small), "step"),
    }
