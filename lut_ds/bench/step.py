"""The training step's benchmark: ours in its variants, an expert's plain PyTorch, and the published code, side by side."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lut_kernels.fp8 import CAPABILITY

from lut_ds.bench.loader import choose_device
from lut_ds.bench.machine import describe_machine
from lut_ds.bench.peers import check_checkout
from lut_ds.bench.rounds import Figures, compare, run_apart, run_rounds, summarise
from lut_ds.bench.step_run import Task, measure
from lut_ds.config import Recipe, apply_override, load_recipe, parse_recipe
from lut_ds.engine.build import flops_shape
from lut_ds.engine.launch import rank_cores
from lut_ds.engine.watch import PEAK_FLOPS
from lut_ds.errors import UserError
from lut_ds.method.flops import step_flops

MODELS = {
    "vit_small_patch16_224": "lut_vits16",
    "vit_base_patch16_224": "lut_vitb16",
    "vit_large_patch16_224": "lut_vitl16",
    "vit_huge_patch14_224": "lut_vith14",
}
# What is measured of ours with --variants: overrides of the recipe, and LUT_KERNELS.
VARIANTS: dict[str, tuple[tuple[str, ...], str]] = {
    "fp32": (("precision.compute=fp32", "precision.teacher=fp32"), "auto"),
    "bf16": (("precision.compute=bf16", "precision.teacher=bf16"), "auto"),
    "fp8 teacher": (("precision.compute=bf16", "precision.teacher=fp8"), "auto"),
    "eager": (("train.compile=false",), "auto"),
    "compiled": (("train.compile=true",), "auto"),
    "library kernels": ((), "torch"),
    "triton kernels": ((), "triton"),
    "zero1": (("train.deepspeed=zero1",), "auto"),
    "zero2": (("train.deepspeed=zero2",), "auto"),
    "zero3": (("train.deepspeed=zero3",), "auto"),
    "activation checkpointing": (("train.activation_checkpointing=true",), "auto"),
    "half micro-batch": (("train.micro_batch={half}",), "auto"),
}


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        batch: images a step, over all ranks.
        steps, warmup: steps of a round that count, and steps before them.
        rounds: every side runs once in each; ratios are taken within a round.
        device: `cpu`, `cuda` or `auto`.
        threads: of torch on a CPU, the same for every side; 0 takes the cores.
        variants: also measure the VARIANTS of ours.
        expert: also measure the expert's baseline, eager and compiled.
        peers: checkouts of the published implementations by name (`lut`, `mae`).
        trace: file for a profiler trace of ours.
    """

    batch: int = 16
    steps: int = 4
    warmup: int = 2
    rounds: int = 3
    device: str = "auto"
    threads: int = 0
    variants: bool = False
    expert: bool = False
    peers: tuple[tuple[str, str], ...] = ()
    trace: str | None = None


def step_recipe(name_or_path: str | None, model: str | None, overrides: Sequence[str], batch: int) -> Recipe:
    """The recipe to measure: by name or path, or the LUT recipe of a timm model name; one micro-batch a step.

    Raises:
        UserError: neither or both given, or an unknown model.
    """
    if (name_or_path is None) == (model is None):
        raise UserError("bench step: expected a recipe or --model, one of them; e.g. lut-ds bench step lut_vitb16")
    if model is not None and model not in MODELS:
        raise UserError(f"--model: expected one of {', '.join(MODELS)}, found {model!r}")
    name = name_or_path or MODELS[str(model)]
    sizes = [f"train.global_batch={batch}", "train.micro_batch=null"]
    return load_recipe(name, [*sizes, *overrides])


def bench_step(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Measure.

    Under a launcher every rank calls this, and ours alone is measured, in this process.

    Returns:
        `machine`, `options`, `model`; `flops`: of the published method, an image and by part; `sides`: by name the median and
        spread over rounds of what `step_run.measure` returns, with `mfu` where the device's peak is known; `ratios`: ours
        over each other's images/s, within rounds; `left_out`: variants that cannot run here, and why.
    """
    device = choose_device(options.device)
    os.environ["DS_ACCELERATOR"] = device
    options = replace(options, threads=options.threads or (rank_cores() if device == "cpu" else 0))
    tasks, left_out = make_tasks(recipe, options, device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        rounds = [{"ours": measure(tasks["ours"])}]
    else:
        rounds = run_rounds(tasks, options.rounds, run_task, "step")
    flops = step_flops(flops_shape(recipe))
    machine = describe_machine()
    for found in rounds:
        for figures in found.values():
            add_mfu(figures, flops["total"], machine["gpu"] if device == "cuda" else None, world)
    return {
        "machine": machine,
        "options": {**vars(options), "device": device, "world_size": world},
        "model": recipe.model.model_dump(),
        "method": recipe.method.name,
        "precision": recipe.precision.model_dump(),
        "flops": flops,
        "sides": {name: summarise([found[name] for found in rounds]) for name in rounds[0]},
        "ratios": compare(rounds, "ours", ("images_per_s",)),
        "left_out": left_out,
    }


def run_task(task: Task) -> Figures:
    """Run a task in a process of its own; RunFault when it fails."""
    return run_apart("lut_ds.bench.step_run", task, task.side)


def make_tasks(recipe: Recipe, options: Options, device: str) -> tuple[dict[str, Task], dict[str, str]]:
    """What to run, by name, and what cannot run here, with the reason."""
    ours = Task(
        side="ours",
        recipe=recipe.model_dump(mode="json"),
        steps=options.steps,
        warmup=options.warmup,
        threads=options.threads,
        breakdown=True,
        trace=options.trace,
    )
    tasks, left_out = {"ours": ours}, {}
    for peer, folder in options.peers:
        checkout = str(check_checkout(peer, folder))
        tasks[f"published {peer}"] = replace(ours, side=peer, checkout=checkout, breakdown=False, trace=None)
    if options.expert:
        for name, compiled in (("expert", False), ("expert compiled", True)):
            tasks[name] = replace(
                ours, side="expert", recipe=changed(recipe, [f"train.compile={compiled}"]), breakdown=False, trace=None
            )
    for name, (overrides, kernels) in VARIANTS.items() if options.variants else ():
        if kernels == "triton" and device == "cpu":
            left_out[name] = "Triton needs a GPU"
        elif "fp8" in name and (device == "cpu" or torch.cuda.get_device_capability() < CAPABILITY):
            left_out[name] = "no fp8 tensor cores here"
        elif "half" in name and options.batch % 2:
            left_out[name] = "the batch is odd"
        else:
            words = [word.format(half=options.batch // 2) for word in overrides]
            tasks[name] = replace(ours, recipe=changed(recipe, words), kernels=kernels, breakdown=False, trace=None)
    return tasks, left_out


def changed(recipe: Recipe, overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe with overrides, as JSON values."""
    tree = recipe.model_dump(mode="json")
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, "benchmark").model_dump(mode="json")


def add_mfu(figures: Figures, flops: float, gpu: str | None, world: int) -> None:
    """Model FLOPs utilisation: the published method's FLOPs, not what an implementation executes, over the bf16 peak."""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if gpu is not None and name in gpu), None)
    if peak is not None:
        figures["mfu"] = figures["images_per_s"] * flops / (peak * world)


def describe_step_bench(report: dict[str, Any]) -> str:
    """The result for people: a line a side, then the parts of ours."""
    lines = [f"{'side':26} {'images/s':>9} {'spread':>15} {'step ms':>9} {'MiB':>7} {'MFU':>6} {'ours is':>8}"]
    for name, found in report["sides"].items():
        speed = found["images_per_s"]
        mfu = f"{found['mfu']['median']:6.1%}" if "mfu" in found else "     -"
        ratio = report["ratios"].get(name)
        times = f"{ratio['images_per_s']['median']:7.2f}x" if ratio else ""
        lines.append(
            f"{name:26} {speed['median']:9.2f} {speed['min']:7.2f}-{speed['max']:<7.2f} {found['step_ms']['median']:9.1f} "
            f"{found['memory_mib']['median']:7.0f} {mfu} {times:>8}"
        )
    ours = report["sides"]["ours"]
    parts = {key.removeprefix("ms_"): value["median"] for key, value in ours.items() if key.startswith("ms_")}
    lines.append("parts of ours, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in parts.items()))
    lines += [f"left out: {name}: {why}" for name, why in report["left_out"].items()]
    return "\n".join(lines)
