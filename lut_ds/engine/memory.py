"""Bytes that a rank holds in each ZeRO stage, part by part, before anything is allocated.

The one source of what memory a run needs: `lut-ds pretrain --dry-run` and `lut-ds plan` both read it. States are held to
the tensors of real runs by `tests/bench/test_counted.py`. What the framework itself takes on a device is not in here.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lut_ds.config import Recipe
from lut_ds.engine.activations import SIZES, activations
from lut_ds.engine.build import build_student
from lut_ds.engine.ds_config import overlaps, zero_stage
from lut_ds.engine.fetching import Fetched, fetched, persistent
from lut_ds.engine.optim import decays
from lut_ds.method.lut import LUT, MAE

ALIGNMENT = 2  # elements a rank: DeepSpeed aligns the flat groups of stages 1 and 2 to it
FALLBACK_BUCKET = 500_000_000  # elements of stage 0's all-reduce


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements that states are made of.

    Attributes:
        groups: of every trainable parameter, by optimizer group.
        gathered: how many of the groups, the first ones, hold what the teacher has.
        teacher: the teacher's weights (0 without one).
        products: those of them that are weights of linear layers in its blocks.
        buffers: position tables and running statistics.
        batch_norms: hidden widths of the heads' batch norms.
    """

    groups: tuple[tuple[int, ...], ...]
    gathered: int
    teacher: int
    products: int
    buffers: int
    batch_norms: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """P, trainable parameters."""
        return sum(map(sum, self.groups))

    @property
    def averaged(self) -> "Sizes":
        """Of the groups alone whose averages are gathered for the teacher."""
        return replace(self, groups=self.groups[: self.gathered])

    def flat(self, world_size: int) -> int:
        """Elements of the flat groups of stages 1 and 2, padded to whole shards."""
        unit = ALIGNMENT * world_size
        return sum(-(-sum(group) // unit) * unit for group in self.groups)

    def partitions(self, world_size: int) -> int:
        """Elements of stage 3's partitions over all ranks, each parameter padded to whole shards."""
        return sum(-(-n // world_size) * world_size for group in self.groups for n in group)

    def touched(self, world_size: int) -> int:
        """Elements of the parameters of which a rank's flat shards hold any part, of the rank that has most."""
        found = [0] * world_size
        for group in self.groups:
            unit = ALIGNMENT * world_size
            shard = -(-sum(group) // unit) * ALIGNMENT
            begin = 0
            for numel in group:
                for rank in range(begin // shard, (begin + numel - 1) // shard + 1):
                    found[rank] += numel
                begin += numel
        return max(found)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank.

    Attributes:
        states: from the first step to the last, by part.
        backward: beside them when the first gradient of the last micro-batch is computed (of a lone one, when it begins or
            ends), by part.
        step: beside them in the optimizer's step and the refresh of the teacher, by part.
    """

    states: dict[str, float]
    backward: dict[str, float]
    step: dict[str, float]

    @property
    def parts(self) -> dict[str, float]:
        """The parts of the larger of the two moments."""
        return {**self.states, **(self.backward if self._in_backward else self.step)}

    @property
    def _in_backward(self) -> bool:
        return sum(self.backward.values()) >= sum(self.step.values())

    @property
    def peak(self) -> float:
        """The most that is held at any one time."""
        return sum(self.parts.values())


def sizes(recipe: Recipe) -> Sizes:
    """Counted on modules without storage."""
    return _sizes(recipe.model_dump_json())


def fetched_weights(recipe: Recipe, zero: Mapping[str, Any]) -> Fetched:
    """What ZeRO-3 gathers in a micro-batch of the recipe; `zero`: the section zero_optimization."""
    return _fetched(recipe.model_dump_json(), tuple(sorted((k, v) for k, v in zero.items() if k.startswith("stage3"))))


@functools.lru_cache(maxsize=64)
def _sizes(recipe: str) -> Sizes:
    student = _skeleton(Recipe.model_validate_json(recipe))
    teacher: list[nn.Module] = [student.encoder, student.projector] if isinstance(student, LUT) else []
    shared = {id(p) for part in teacher for p in part.parameters()}
    groups: dict[tuple[bool, bool], list[int]] = {(s, d): [] for s in (True, False) for d in (True, False)}
    for name, parameter in student.named_parameters():
        groups[id(parameter) in shared, decays(name, parameter)].append(parameter.numel())
    linears = [m for m in student.encoder.blocks.modules() if isinstance(m, nn.Linear)] if teacher else []
    norms = [m.num_features for m in student.modules() if isinstance(m, nn.BatchNorm1d)]
    return Sizes(
        tuple(tuple(group) for group in groups.values() if group),
        sum(bool(group) for (is_shared, _), group in groups.items() if is_shared),
        sum(p.numel() for part in teacher for p in part.parameters()),
        sum(layer.weight.numel() for layer in linears),
        sum(b.numel() for part in (student, *teacher) for b in part.buffers()),
        tuple(norms),
    )


@functools.lru_cache(maxsize=64)
def _fetched(recipe: str, zero: tuple[tuple[str, Any], ...]) -> Fetched:
    parsed = Recipe.model_validate_json(recipe)
    return fetched(_skeleton(parsed), dict(zero), parsed.train.activation_checkpointing)


def _skeleton(recipe: Recipe) -> MAE:
    with torch.device("meta"):
        return build_student(recipe)


def memory(
    recipe: Recipe,
    config: Mapping[str, Any],
    world_size: int,
    micro_batch: int,
    accumulation: int,
    device: str = "cuda",
) -> Memory:
    """What a rank holds.

    Args:
        recipe: with `train.activation_checkpointing` and `precision` as they will be.
        config: a validated DeepSpeed configuration.
        world_size, micro_batch, accumulation: of the run.
        device: `cuda` or `cpu`, which decides what the activations keep.

    Masters, moments and averages are sharded from stage 1, gradients from stage 2, weights from stage 3 (Rajbhandari et al.,
    "ZeRO", SC 2020). As our engine runs it: with bf16, stages 2 and 3 accumulate their shard of the gradients in fp32, and
    stage 1 all of them in bf16.
    """
    stage, zero = zero_stage(dict(config)), config.get("zero_optimization", {})
    count, e = sizes(recipe), SIZES[recipe.precision.compute]
    passing = activations(recipe, micro_batch, world_size, device)
    whole = {0: count.parameters, 1: count.flat(world_size), 2: count.flat(world_size)}.get(
        stage, count.partitions(world_size)
    )
    shard = whole / world_size if stage > 0 else whole
    small = sum(n for group in count.groups for n in group if persistent(n, zero))
    fp8 = recipe.precision.teacher == "fp8"
    states = {
        "weights": (shard + small if stage == 3 else whole) * e,
        "masters": 4.0 * shard if stage > 0 else 0.0,
        "moments": 8.0 * shard,
        "ema": 4.0 * shard if count.teacher else 0.0,
        "teacher": float(count.teacher * SIZES[recipe.precision.teacher] - fp8 * count.products),
        "buffers": 4.0 * count.buffers + (_bucket(zero) * e if stage == 3 else 0.0),
        "inputs": passing.inputs,
    }
    # In fp32 stage 2 keeps the gradients of parameters that cross a border whole.
    second = 4.0 * shard if e == 2 else 4.0 * count.touched(world_size)
    gradients = {0: 4.0 * whole, 1: float(e * count.parameters), 2: second, 3: 4.0 * shard}[stage]
    passes = passing.peak - passing.inputs
    if accumulation == 1:  # gradients come as activations go
        gradients, passes = (gradients, 0.0) if gradients > passes else (0.0, passes)
    backward = {
        "gradients": gradients,
        "activations": passes,
        "exchange": _exchange(recipe, zero, stage, world_size) * e,
    }
    return Memory(states, backward, _step(recipe, zero, stage, world_size, shard, whole))


def _bucket(zero: Mapping[str, Any]) -> int:
    return int(zero.get("reduce_bucket_size", 500_000_000))


def _exchange(recipe: Recipe, zero: Mapping[str, Any], stage: int, world_size: int) -> float:
    """Elements that the reduction of gradients, and of stage 3 the gathered weights, take in the backward pass."""
    parameters = sizes(recipe).parameters
    if stage == 0:
        return min(parameters, FALLBACK_BUCKET) if world_size > 1 else 0
    filled = min(_bucket(zero), parameters)
    if stage < 3:
        # One bucket is filled while the other is sent, in a flat copy of its slices.
        return _bucket(zero) * (2 if overlaps(zero, world_size) else 1) + (filled if world_size > 1 else 0)
    return 2 * filled + fetched_weights(recipe, zero).live  # the bucket's gradients, and their flat copy


def _step(
    recipe: Recipe, zero: Mapping[str, Any], stage: int, world_size: int, shard: float, whole: float
) -> dict[str, float]:
    """Beside the states in the optimizer's step; the teacher is refreshed after the gradients are gone."""
    e, count = SIZES[recipe.precision.compute], sizes(recipe)
    if stage == 3:
        # The shard of the gradients stays, and a sub-group's is copied for the update.
        update, stays = 4 * min(shard, zero.get("sub_group_size", 1e9)), 4.0 * shard
    else:
        stays = 0.0
        update = {0: 4.0 * whole, 1: (e + 4.0) * shard, 2: 4.0 * shard}[stage]
    teacher = SIZES[recipe.precision.teacher]
    refresh = 0.0
    if count.teacher:
        copied = teacher < 4 or stage > 0
        gathered = {0: count.averaged.parameters, 3: count.averaged.partitions(world_size)}.get(
            stage, count.averaged.flat(world_size)
        )
        own = gathered / world_size if stage > 0 and world_size > 1 else 0
        refresh = copied * (gathered + own) * teacher
    return {
        "gradients": stays + (update if update >= refresh else 0.0),
        "refresh": refresh if refresh > update else 0.0,
    }
