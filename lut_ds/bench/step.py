"""The training step's benchmark: ours in its variants, an expert's plain PyTorch, and the published code, side by side."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lut_kernels.fp8 import CAPABILITY

from lut_ds.bench.ceiling import add_utilisation, matmul_ceiling, peak_flops
from lut_ds.bench.loader import choose_device
from lut_ds.bench.machine import describe_machine
from lut_ds.bench.peers import ENTRIES, check_checkout
from lut_ds.bench.rounds import Figures, compare, run_apart, run_rounds, summarise
from lut_ds.bench.step_checks import check_same_work, check_sizes, check_trace
from lut_ds.bench.step_run import Task, measure
from lut_ds.config import Recipe, apply_override, load_recipe, parse_recipe
from lut_ds.engine.build import flops_shape
from lut_ds.engine.launch import rank_cores
from lut_ds.errors import UserError
from lut_ds.method.flops import step_flops

MODELS = {
    "vit_small_patch16_224": "lut_vits16",
    "vit_base_patch16_224": "lut_vitb16",
    "vit_large_patch16_224": "lut_vitl16",
    "vit_huge_patch14_224": "lut_vith14",
}
OURS = {"ours", "ours from files"}
# What is measured of ours with --variants: overrides of the recipe, and the kernels that are forced.
VARIANTS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "fp32": (("precision.compute=fp32", "precision.teacher=fp32"), None),
    "bf16": (("precision.compute=bf16", "precision.teacher=bf16"), None),
    "fp8 teacher": (("precision.compute=bf16", "precision.teacher=fp8"), None),
    "eager": (("train.compile=false",), None),
    "compiled": (("train.compile=true",), None),
    "library kernels": ((), "torch"),
    "triton kernels": ((), "triton"),
    "zero1": (("train.deepspeed=zero1",), None),
    "zero2": (("train.deepspeed=zero2",), None),
    "zero3": (("train.deepspeed=zero3",), None),
    "activation checkpointing": (("train.activation_checkpointing=true",), None),
    "half micro-batch": (("train.micro_batch={half}",), None),
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

    Under a launcher every rank calls this, and ours alone is measured, in this process. Where the recipe has a `data.path`,
    ours is measured twice: with images that are ready, as the other sides, and fed by the loader.

    Returns:
        `machine`, `options`, `model`; `flops`: of the published method, an image and by part; `ceilings`: by precision the
        FLOP/s of the fastest matrix product measured on one device; `sides`: by name the median and spread over rounds of
        what `step_run.measure` returns, with `of_ceiling`, and `mfu` where the device's peak is known, each in the side's
        precision; `ratios`: ours over each other's images/s, within rounds; `left_out`: variants that cannot run here, and why.

    Raises:
        UserError: sizes or sides that do not fit together.
    """
    device, world = choose_device(options.device), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ["DS_ACCELERATOR"] = device
    threads = options.threads or (rank_cores() if device == "cpu" else 0)
    options = replace(options, batch=recipe.train.global_batch, threads=threads)
    tasks, left_out = make_tasks(recipe, options, device)
    check_sizes(recipe, world)
    if world > 1:
        left_out |= dict.fromkeys(tasks.keys() - OURS, "several ranks: ours alone is measured")
        tasks = {name: task for name, task in tasks.items() if name in OURS}
    ceilings = {p: matmul_ceiling(p, threads) for p in sorted({precision_of(task, device) for task in tasks.values()})}
    if world > 1:
        rounds = [{name: measure(task) for name, task in tasks.items()}]
    else:
        rounds = run_rounds(tasks, options.rounds, run_task, "step")
    flops, machine = step_flops(flops_shape(recipe)), describe_machine()
    for found in rounds:
        for name, figures in found.items():
            precision = precision_of(tasks[name], device)
            peak = peak_flops(machine["gpu"], precision) if device == "cuda" else None
            whole = None if peak is None else peak * world
            add_utilisation(figures, flops["total"], whole, ceilings[precision] * world)
    return {
        "machine": machine,
        "options": {**vars(options), "device": device, "world_size": world},
        "model": recipe.model.model_dump(),
        "method": recipe.method.name,
        "precision": recipe.precision.model_dump(),
        "flops": flops,
        "ceilings": ceilings,
        "sides": {name: summarise([found[name] for found in rounds]) for name in rounds[0]},
        "ratios": compare(rounds, "ours", ("images_per_s",)),
        "left_out": left_out,
    }


def precision_of(task: Task, device: str) -> str:
    """`fp32` or `bf16`: what a side multiplies in. Published code runs under fp16 autocast on a GPU, as fast as bf16."""
    if task.side in ENTRIES:
        return "fp32" if device == "cpu" else "bf16"
    return str(task.recipe["precision"]["compute"])


def run_task(task: Task) -> Figures:
    """Run a task in a process of its own; RunFault when it fails."""
    return run_apart("lut_ds.bench.step_run", task, task.side)


def make_tasks(recipe: Recipe, options: Options, device: str) -> tuple[dict[str, Task], dict[str, str]]:
    """What to run, by name, and what cannot run here, with the reason.

    Raises:
        UserError: a side that would do other work, no checkout, or a trace that cannot be written.
    """
    check_same_work(recipe, [peer for peer, _ in options.peers], options.expert)
    if options.trace is not None:
        check_trace(options.trace)
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
    if recipe.data.path is not None:
        tasks["ours from files"] = replace(ours, files=True, trace=None)
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
        elif "half" in name and (options.batch % 2 or options.batch < 4):
            left_out[name] = "the batch has no half of 2 images or more"
        else:
            words = [word.format(half=options.batch // 2) for word in overrides]
            tasks[name] = replace(ours, recipe=changed(recipe, words), kernels=kernels, trace=None)
    return tasks, left_out


def changed(recipe: Recipe, overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe with overrides, as JSON values."""
    tree = recipe.model_dump(mode="json")
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, "benchmark").model_dump(mode="json")


def describe_step_bench(report: dict[str, Any]) -> str:
    """The result for people: a line a side, then the parts of the sides of ours."""
    lines = [
        f"{'side':26} {'images/s':>9} {'spread':>15} {'step ms':>9} {'MiB':>7} {'MFU':>6} {'of ceiling':>10} {'ours is':>8}"
    ]
    for name, found in report["sides"].items():
        speed = found["images_per_s"]
        mfu = f"{found['mfu']['median']:6.1%}" if "mfu" in found else "     -"
        ratio = report["ratios"].get(name)
        times = f"{ratio['images_per_s']['median']:7.2f}x" if ratio else ""
        lines.append(
            f"{name:26} {speed['median']:9.2f} {speed['min']:7.2f}-{speed['max']:<7.2f} {found['step_ms']['median']:9.1f} "
            f"{found['memory_mib']['median']:7.0f} {mfu} {found['of_ceiling']['median']:10.1%} {times:>8}"
        )
    ceilings = ", ".join(f"{flops / 1e12:.3g} TFLOP/s in {name}" for name, flops in report["ceilings"].items())
    lines.append(f"ceiling, the fastest matrix product measured here on one device: {ceilings}")
    for name, found in report["sides"].items():
        parts = {key.removeprefix("ms_"): value["median"] for key, value in found.items() if key.startswith("ms_")}
        if parts:
            lines.append(f"parts of {name}, ms: " + ", ".join(f"{part} {ms:.1f}" for part, ms in parts.items()))
    lines += [f"left out: {name}: {why}" for name, why in report["left_out"].items()]
    return "\n".join(lines)
