"""The whole plan of a run on a cluster that is not here, or the reason why there is none and what would fit."""

from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from typing import Any

from lut_ds.bench.planner.assumptions import assumptions
from lut_ds.bench.planner.devices import DEVICES, LOADER_CPU_MS, assumed_mfu
from lut_ds.bench.planner.fit import FIXABLE, Fitter, Way, check_batch
from lut_ds.bench.planner.measured import measured_for
from lut_ds.bench.planner.scaling import strong_scaling, weak_scaling, weak_target
from lut_ds.bench.planner.timing import Cluster, StepTime, step_time
from lut_ds.bench.planner.traffic import traffic
from lut_ds.config import Recipe
from lut_ds.engine.build import flops_shape
from lut_ds.engine.ds_config import load_ds_config, zero_stage
from lut_ds.engine.plan import parameter_counts
from lut_ds.errors import UserError
from lut_ds.method.flops import step_flops

GIB = 2.0**30
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Request:
    """What to plan for.

    Attributes:
        gpus: in all; gpu: a name of DEVICES; node: GPUs of a node.
        net: Gbit/s each way of a GPU's share of the network between nodes; None: the maker's own system.
        images: of the training set.
        measured: a report of `lut-ds bench step --json`.
        fixed: recipe keys that the user set, and that the plan keeps (those of FIXABLE count).
    """

    gpus: int
    gpu: str
    net: float | None = None
    node: int = 8
    images: int = IMAGENET
    measured: str | None = None
    fixed: Set[str] = frozenset()


def plan_run(recipe: Recipe, name: str, request: Request) -> dict[str, Any]:
    """The plan as JSON values.

    Raises:
        UserError: nothing fits, or what the user fixed does not; the message names what does.
    """
    device = DEVICES[request.gpu]
    cluster = Cluster(device, request.gpus, request.node, request.net or device.net)
    if request.images < recipe.train.global_batch:
        raise UserError(
            f"--images: expected at least train.global_batch {recipe.train.global_batch}, found {request.images}; lower train.global_batch"
        )
    check_batch(recipe, request.gpus)
    if recipe.precision.teacher == "fp8" and not device.fp8:
        raise UserError(
            f"precision.teacher: {request.gpu} has no fp8 tensor cores; use precision.teacher=bf16, or --gpu h100"
        )
    measured = measured_for(recipe, device, request.measured)
    low, expected = measured.mfu[:2] if measured else assumed_mfu(device, recipe.model.width)
    fitter = Fitter(recipe, cluster, expected, frozenset(request.fixed & set(FIXABLE)))
    way = fitter.best()
    if way is None:
        raise UserError(refusal(fitter, name, request))
    slow = step_time(way.recipe, way.config, cluster, way.micro_batch, way.accumulation, low)
    weak = weak_scaling(way, cluster, expected)
    return {
        "recipe": name,
        "gpu": request.gpu,
        "gpus": request.gpus,
        "nodes": -(-request.gpus // request.node),
        "net_gbit_per_s_a_gpu": cluster.net,
        "parameters": parameter_counts(recipe),
        "gflop_per_image": {part: flops / 1e9 for part, flops in step_flops(flops_shape(recipe)).items()},
        "usable_gib": fitter.usable / GIB,
        "stages": {str(stage): _stage(fitter, stage, way.micro_batch) for stage in fitter.stages()},
        "as_written": _as_written(fitter),
        "chosen": _chosen(way),
        "traffic": _traffic(way, cluster),
        **_prediction(recipe, way, slow, request),
        "loader": _loader(way, request),
        "scaling": {"weak": weak, "strong": strong_scaling(fitter)},
        "weak_scaling_target": weak_target(weak),
        "assumptions": assumptions(recipe, way, cluster, measured, (low, expected), request.images),
        "measured": None if measured is None else asdict(measured),
    }


def _gib(parts: dict[str, float]) -> dict[str, float]:
    return {part: size / GIB for part, size in parts.items()} | {"total": sum(parts.values()) / GIB}


def _stage(fitter: Fitter, stage: int, micro_batch: int) -> dict[str, Any]:
    """A stage's memory by part at the chosen micro-batch, and the largest micro-batch that it allows."""
    found: dict[str, Any] = {}
    for key, checkpointing in (("plain", False), ("checkpointing", True)):
        way, largest = fitter.way(stage, micro_batch, checkpointing), fitter.largest(stage, checkpointing)
        found[key] = {
            "memory_gib": _gib(way.memory.parts),
            "fits": fitter.fits(way),
            "memory_allows_micro_batch": fitter.limit(stage, checkpointing),
            "largest_micro_batch": None if largest is None else largest.micro_batch,
            "step_s": None if largest is None else largest.time.total,
        }
    return found


def _as_written(fitter: Fitter) -> dict[str, Any]:
    """The recipe's own stage and micro-batch on this cluster."""
    train = fitter.recipe.train
    micro = min(train.micro_batch or fitter.share, fitter.share)
    stage = zero_stage(load_ds_config(fitter.recipe))
    if fitter.share % micro:
        return {
            "zero_stage": stage,
            "micro_batch": micro,
            "fits": False,
            "why": f"does not divide {fitter.share} images",
        }
    way = fitter.way(stage, micro, train.activation_checkpointing)
    return {
        "zero_stage": stage,
        "micro_batch": micro,
        "accumulation": way.accumulation,
        "activation_checkpointing": way.checkpointing,
        "memory_gib": way.memory.peak / GIB,
        "fits": fitter.fits(way),
        "step_s": way.time.total,
    }


def _chosen(way: Way) -> dict[str, Any]:
    return {
        "zero_stage": way.stage,
        "micro_batch": way.micro_batch,
        "accumulation": way.accumulation,
        "activation_checkpointing": way.checkpointing,
        "memory_gib": _gib(way.memory.parts),
        "overrides": way.words(),
    }


def _traffic(way: Way, cluster: Cluster) -> dict[str, Any]:
    """Bytes a rank and optimizer step."""
    kinds = {
        kind: {
            "operation": c.operation,
            "payload_bytes": c.payload,
            "wire_bytes": c.wire(cluster.gpus),
            "calls": c.calls,
            "exposed_s": way.time.exposed[kind],
        }
        for kind, c in traffic(way.recipe, way.config, cluster.gpus, way.accumulation).items()
    }
    return {"kinds": kinds, "wire_bytes": sum(kind["wire_bytes"] for kind in kinds.values())}


def _prediction(recipe: Recipe, way: Way, slow: StepTime, request: Request) -> dict[str, Any]:
    """Speed and cost: as expected, and with the low efficiency."""
    train, device = recipe.train, DEVICES[request.gpu]
    steps = request.images // train.global_batch * train.epochs
    steps = min(steps, train.max_steps or steps)
    peak = device.peak if recipe.precision.compute == "bf16" else device.peak_fp32
    flops = step_flops(flops_shape(recipe))["total"]

    def figures(time: StepTime) -> dict[str, Any]:
        rate, hours = train.global_batch / time.total, steps * time.total / 3600
        parts = {k: v for k, v in asdict(time).items() if k != "exposed"}
        return {
            "step_s": time.total,
            "parts_s": {**parts, "network": time.network},
            "images_per_s": rate,
            "mfu": rate * flops / (peak * request.gpus),
            "hours": hours,
            "gpu_hours": hours * request.gpus,
        }

    return {
        "steps": steps,
        "expected": figures(way.time),
        "low": figures(slow),
        "limit": way.time.binding(way.micro_batch * way.accumulation),
    }


def _loader(way: Way, request: Request) -> dict[str, Any]:
    """What the data loader has to deliver."""
    rate = way.recipe.train.global_batch / way.time.total
    node = rate * min(request.node, request.gpus) / request.gpus
    return {
        "images_per_s_a_node": node,
        "cpu_cores_a_node_without_gpu_decoding": node * LOADER_CPU_MS / 1e3,
        "cpu_ms_an_image": LOADER_CPU_MS,
    }


def refusal(fitter: Fitter, name: str, request: Request) -> str:
    """One line: what was asked, what it needs, and what would fit."""
    usable = f"{fitter.usable / GIB:.1f} GiB that a run may take of {request.gpu}"
    train = fitter.recipe.train
    share, micro = fitter.share, min(train.micro_batch or 1, fitter.share)
    if "train.micro_batch" in fitter.fixed and share % micro:
        problem = f"train.micro_batch {train.micro_batch} does not divide the {share} images of a rank"
    elif not fitter.enough(micro if "train.micro_batch" in fitter.fixed else share):
        problem = (
            "batch norm in the heads needs at least 2 images of a micro-batch over all ranks, or method.head_norm=ln"
        )
    else:
        stage = zero_stage(load_ds_config(fitter.recipe)) if "train.deepspeed" in fitter.fixed else 3
        fixed = "train.micro_batch" in fitter.fixed
        checkpointing = train.activation_checkpointing if fitter.fixed else True
        least = fitter.way(stage, micro if fixed else 1, checkpointing)
        problem = f"ZeRO {stage} with micro-batch {least.micro_batch} needs {least.memory.peak / GIB:.1f} GiB, more than the {usable}"
    free = Fitter(fitter.recipe, fitter.cluster, fitter.mfu)
    found = [w for s in free.stages() for c in (False, True) if (w := free.largest(s, c)) is not None]
    options = [w.words() for w in sorted(found, key=lambda w: (w.checkpointing, w.stage))]
    if not options:
        options = [*_more_gpus(fitter), *_larger_gpus(fitter, request)] or ["a smaller model"]
    return f"{name} on {request.gpus} x {request.gpu}: {problem}; what fits: {'; '.join(options)}"


def _more_gpus(fitter: Fitter) -> list[str]:
    """The smallest larger number of GPUs on which something fits."""
    batch = fitter.recipe.train.global_batch
    for gpus in (n for n in range(fitter.cluster.gpus + 1, min(batch, 1024) + 1) if batch % n == 0):
        way = Fitter(fitter.recipe, replace(fitter.cluster, gpus=gpus), fitter.mfu).best()
        if way is not None:
            return [f"--gpus {gpus} with {way.words()}"]
    return []


def _larger_gpus(fitter: Fitter, request: Request) -> list[str]:
    """Other GPUs of which the same number would do."""
    for name, device in DEVICES.items():
        if device.memory_gib > fitter.cluster.device.memory_gib:
            way = Fitter(fitter.recipe, replace(fitter.cluster, device=device), fitter.mfu).best()
            if way is not None:
                return [f"--gpu {name} with {way.words()}"]
    return []
