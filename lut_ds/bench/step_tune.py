"""Find the micro-batch of a step, and whether compiling or recomputing pays: one trial after the other, each a process."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from tqdm import tqdm

from lut_ds.bench.loader import choose_device
from lut_ds.bench.machine import describe_machine
from lut_ds.bench.rounds import Figures
from lut_ds.bench.step import Options, changed, make_tasks, run_task
from lut_ds.bench.step_run import OUT_OF_MEMORY, Task
from lut_ds.config import Recipe
from lut_ds.engine.launch import rank_cores
from lut_ds.errors import UserError

WORTH = (
    1.03  # of settings within 3 % of the fastest, the first one tried is kept: it needs least memory and time to start
)
_SHARE = 0.8  # of the free memory of a machine without a GPU
_SMALLEST = 64  # parts of the batch
Settings = dict[str, Any]
Trial = dict[str, Any]


def tune_step(
    recipe: Recipe, options: Options, memory_gib: float | None = None, run: Callable[[Task], Figures] = run_task
) -> dict[str, Any]:
    """Micro-batches first, doubling until memory ends or two in a row are no faster; then the other settings at the best.

    Every trial makes whole optimizer steps of `options.batch` images, with as much accumulation as its micro-batch needs: a
    small one pays for its launches, and none for optimizer steps that the run would not make.

    Args:
        recipe: its global batch is `options.batch`, what this rank sees in a step.
        memory_gib: what a trial may take beside the program itself; default: the GPU's, or without one 80 % of what is free.
        run: measures a task; a process for each by default.

    Returns:
        `machine`, `options`, `memory_gib`; `trials`: settings with `images_per_s`, `step_ms` and `memory_mib`, or
        `out_of_memory`; `chosen`: the best of them; `overrides`: its settings, to paste behind a command.

    Raises:
        UserError: more than one rank, or not even the smallest micro-batch fits.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("bench step --tune: expected one process, found a launcher's; start it without, on one GPU")
    device = choose_device(options.device)
    os.environ["DS_ACCELERATOR"] = device
    threads = options.threads or (rank_cores() if device == "cpu" else 0)
    options = replace(options, batch=recipe.train.global_batch, threads=threads)
    memory = memory_gib * 2**30 if memory_gib is not None else _free_memory(device)
    base = replace(make_tasks(recipe, options, device)[0]["ours"], breakdown=False, trace=None, memory=memory)
    with tqdm(desc="tuning", unit="trial", file=sys.stderr) as bar:

        def attempt(settings: Settings) -> Trial:
            bar.set_postfix_str(" ".join(overrides(settings)))
            found = run(replace(base, recipe=changed(recipe, overrides(settings))))
            bar.update()
            return {**settings, **found}

        compiled = recipe.train.compile is True or (recipe.train.compile == "auto" and device == "cuda")
        trials = search(micro_batches(options.batch), compiled, attempt)
    chosen = best_of(trials)
    if chosen is None:
        raise UserError(
            f"bench step --tune: not even train.micro_batch={trials[0]['micro_batch']} fits into {memory / 2**30:.1f} GiB; "
            "use another train.deepspeed on more GPUs, a smaller model, or a smaller --batch"
        )
    return {
        "machine": describe_machine(),
        "options": {**vars(options), "device": device},
        "memory_gib": memory / 2**30,
        "trials": trials,
        "chosen": chosen,
        "overrides": overrides(chosen),
    }


def micro_batches(batch: int) -> list[int]:
    """What is tried: halves of the batch that are whole, smallest first; at least 2 images, which batch norm needs."""
    found = [batch]
    while found[0] % 2 == 0 and found[0] // 2 >= max(2, batch // _SMALLEST):
        found.insert(0, found[0] // 2)
    return found


def search(sizes: Sequence[int], compiled: bool, attempt: Callable[[Settings], Trial]) -> list[Trial]:
    """All trials, in order; `compiled`: whether the first ones are."""
    trials: list[Trial] = []
    full, slower = False, 0
    for size in sizes:
        best = best_of(trials)
        trials.append(attempt({"micro_batch": size}))
        if full := OUT_OF_MEMORY in trials[-1]:
            break
        slower = slower + 1 if best is not None and trials[-1]["images_per_s"] < WORTH * best["images_per_s"] else 0
        if slower == 2:
            break
    if (best := best_of(trials)) is not None:
        trials.append(attempt({"micro_batch": best["micro_batch"], "compile": not compiled}))
    if full:  # recomputing costs a third more work and makes room for the size that did not fit
        best = best_of(trials) or {}
        size = trials[-2]["micro_batch"] if best else sizes[0]
        kept = {"compile": best["compile"]} if "compile" in best else {}
        trials.append(attempt({"micro_batch": size, **kept, "activation_checkpointing": True}))
    return trials


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The first of those within 3 % of the fastest; None when none fitted."""
    fitted = [trial for trial in trials if OUT_OF_MEMORY not in trial]
    fastest = max((trial["images_per_s"] for trial in fitted), default=0.0)
    return next((trial for trial in fitted if trial["images_per_s"] * WORTH >= fastest), None)


def overrides(settings: Settings) -> list[str]:
    """Settings as words of a command line."""
    keys = ("micro_batch", "compile", "activation_checkpointing")
    return [f"train.{key}={str(settings[key]).lower()}" for key in keys if key in settings]


def _free_memory(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return _SHARE * psutil.virtual_memory().available


def describe_step_tuning(report: dict[str, Any]) -> str:
    """The result for people: a line a trial, then what to paste."""
    lines = [f"{'images/s':>9} {'step ms':>9} {'MiB':>7}  settings, of at most {report['memory_gib']:.1f} GiB"]
    for trial in report["trials"]:
        words = " ".join(overrides(trial))
        if OUT_OF_MEMORY in trial:
            lines.append(f"{'out of memory':>27}  {words}")
        else:
            lines.append(f"{trial['images_per_s']:9.2f} {trial['step_ms']:9.1f} {trial['memory_mib']:7.0f}  {words}")
    return "\n".join([*lines, "best: " + " ".join(report["overrides"])])
