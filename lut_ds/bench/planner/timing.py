"""How long an optimizer step should take: compute, exchanges that nothing hides, optimizer, and waiting for the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lut_ds.bench.planner.devices import (
    KERNELS,
    LATENCY_HOP,
    LATENCY_NODE,
    LAUNCH,
    LINK_EFFICIENCY,
    MEMORY_EFFICIENCY,
    OVERLAP,
    UNCOMPILED,
    Device,
)
from lut_ds.bench.planner.traffic import Collective, traffic
from lut_ds.config import Recipe
from lut_ds.engine.build import flops_shape
from lut_ds.engine.ds_config import zero_stage
from lut_ds.engine.memory import sizes
from lut_ds.method.flops import forward_flops

MOSTLY = 0.8  # share of a step that makes compute its limit


@dataclass(frozen=True)
class Cluster:
    """GPUs and their network.

    Attributes:
        gpus: in all.
        node: GPUs of a node.
        net: Gbit/s each way of a GPU's share of the network between nodes.
    """

    device: Device
    gpus: int
    node: int
    net: float

    def rate(self) -> float:
        """Bytes/s at which a ring over all ranks moves what leaves a rank.

        A ring leaves a node once, over all its adapters together; within a node the links' rate is the limit.
        """
        links = self.device.link
        if self.gpus > self.node:
            fewest = self.gpus % self.node or self.node  # adapters of the node that has least: the ring is as slow
            links = min(links, fewest * self.net * 1e9 / 8)
        return links * LINK_EFFICIENCY

    def latency(self) -> float:
        """Seconds of a collective beside its bytes."""
        nodes = -(-self.gpus // self.node)
        return LATENCY_NODE + LATENCY_HOP * (nodes - 1).bit_length()


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by part.

    Attributes:
        compute: forward and backward passes of student and teacher at the assumed or measured efficiency.
        recompute: forward passes that activation checkpointing repeats.
        launch: time beyond those in which the host cannot start kernels fast enough.
        exposed: exchanges that no computation hides, by name; hidden: all those that are.
        optimizer: AdamW and EMA over a rank's shard.
    """

    compute: float
    recompute: float
    launch: float
    exposed: dict[str, float]
    hidden: float
    optimizer: float

    @property
    def network(self) -> float:
        """Exchanges that no computation hides."""
        return sum(self.exposed.values())

    @property
    def total(self) -> float:
        """Of the step."""
        return self.compute + self.recompute + self.launch + self.network + self.optimizer

    def binding(self, images: int) -> str:
        """Compute, if that is nearly all of the step; else what adds most to it: network, memory, too few images a GPU."""
        costs = {
            "network": self.network,
            "memory": self.recompute,
            f"global batch too small: {images} images a GPU": self.launch + self.optimizer,
        }
        return "compute" if self.compute >= MOSTLY * self.total else max(costs, key=lambda name: costs[name])


def _teacher_peak(recipe: Recipe, device: Device) -> float:
    """FLOP/s of the teacher's products: fp8 is counted as bf16, fp32 beside a bf16 student runs in TF32, at half of that."""
    if recipe.precision.teacher != "fp32":
        return device.peak
    return device.peak / 2 if recipe.precision.compute == "bf16" else device.peak_fp32


def step_time(
    recipe: Recipe, config: Mapping[str, Any], cluster: Cluster, micro_batch: int, accumulation: int, mfu: float
) -> StepTime:
    """Predict a step; `mfu`: utilisation while forward and backward passes compute."""
    device, images = cluster.device, micro_batch * accumulation
    peak = device.peak if recipe.precision.compute == "bf16" else device.peak_fp32
    forward = forward_flops(flops_shape(recipe))
    # ZeRO-3 compiles the teacher only.
    student = UNCOMPILED if recipe.train.compile is False or zero_stage(dict(config)) == 3 else 1.0
    teacher = UNCOMPILED if recipe.train.compile is False else 1.0
    second = images / (peak * mfu)  # of one FLOP an image
    trained = second * student * (sum(forward.values()) - forward["teacher"])
    compute = 3 * trained + second * teacher * forward["teacher"] * peak / _teacher_peak(recipe, device)
    again = second * student * (forward["student"] + forward["decoder"])
    recompute = again if recipe.train.activation_checkpointing else 0.0
    backward = 2 * trained
    launch = max(0.0, accumulation * _launches(recipe) * LAUNCH - compute - recompute)
    # Exchanges also run beside kernels that wait for the host.
    longer = (compute + launch) / compute
    exposed, hidden = _exchanges(recipe, config, cluster, accumulation, backward * longer, compute * longer)
    return StepTime(compute, recompute, launch, exposed, hidden, _optimizer(recipe, config, cluster))


def _launches(recipe: Recipe) -> float:
    """Kernels of a micro-batch."""
    m = recipe.model
    teacher = m.depth if recipe.method.name == "lut" else 0
    return KERNELS["student"] * (m.depth + m.decoder_depth) + KERNELS["teacher"] * teacher + KERNELS["other"]


def _exchanges(
    recipe: Recipe, config: Mapping[str, Any], cluster: Cluster, accumulation: int, backward: float, compute: float
) -> tuple[dict[str, float], float]:
    """Seconds of each exchange that nothing hides, and of all that are hidden."""
    exposed, hidden = {}, 0.0
    stage = zero_stage(dict(config))
    for name, collective in traffic(recipe, config, cluster.gpus, accumulation).items():
        seconds = collective.wire(cluster.gpus) / cluster.rate() + collective.calls * cluster.latency()
        room = 0.0
        if name == "gradients" and collective.phase == "backward":
            room = OVERLAP * backward / (1 if stage >= 2 else accumulation)
        elif name == "weights" and stage == 3:
            room = OVERLAP * (compute - backward)
        covered = min(seconds * _overlapping(collective, stage, accumulation), room)
        hidden += covered
        exposed[name] = seconds - covered
    return exposed, hidden


def _overlapping(collective: Collective, stage: int, accumulation: int) -> float:
    """Share of an exchange that may run beside computation: all buckets but the last of a backward pass."""
    if stage == 3 and collective.operation == "all_gather":
        return 1.0
    buckets = collective.calls / (accumulation if stage >= 2 else 1)
    return (buckets - 1) / buckets if buckets else 0.0


def _optimizer(recipe: Recipe, config: Mapping[str, Any], cluster: Cluster) -> float:
    """AdamW reads and writes the masters and moments and reads gradients (28 bytes), the EMA three times (12)."""
    count = sizes(recipe)
    shard = count.parameters / (cluster.gpus if zero_stage(dict(config)) > 0 else 1)
    moved = shard * (28 + (12 if count.teacher else 0)) + 4 * count.teacher
    return moved / (cluster.device.memory_rate * MEMORY_EFFICIENCY)
