"""Find how this machine loads fastest, one setting at a time, and keep it for the runs to come."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lut_ds.bench.loader import Options, choose_device, make_task, open_images, run_task, with_data
from lut_ds.bench.loader_run import Task, task_loading
from lut_ds.bench.machine import describe_machine
from lut_ds.config import Recipe
from lut_ds.data.outputs import writable_folder
from lut_ds.data.tuning import machine_key, save_tuning, tuning_file
from lut_ds.engine.launch import rank_cores
from lut_ds.engine.reading import loading

_WORTH = 1.03  # a setting that costs more must be this much faster
Run = Callable[[Task], dict[str, float]]


def tune_loader(recipe: Recipe, options: Options, run: Run = run_task) -> dict[str, Any]:
    """Threads first, then prefetch, then on a GPU the hardware decoder's share and preallocation.

    Of settings within 3 % of the fastest, the one that costs least (fewer threads, less memory) is kept.

    Args:
        run: measures a task; a process for each by default.

    Returns:
        `machine`, `options`, `data`; `trials`: settings and figures; `chosen`; `file`: where it is stored, and `key`:
        for which machine.
    """
    device = choose_device(options.device)
    writable_folder(tuning_file().parent)
    cores = rank_cores()
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    trials: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lut-ds-bench-") as work:
        recipe, data = with_data(recipe, Path(work))
        open_images(recipe, options.batch_size)
        best = replace(make_task(recipe, options, device, work), workers=1, prefetch=2)
        with tqdm(desc="tuning", unit="trial", file=sys.stderr) as bar:
            for name, values in settings(cores, device):
                best = _search(best, name, values, run, trials, bar)
    chosen = task_loading(best, loading(recipe, torch.device("cpu")))
    key = machine_key(cores, gpu, recipe.model.image_size)
    file = save_tuning(key, chosen)
    return {
        "machine": describe_machine(),
        "options": {**options.__dict__, "device": device},
        "data": data,
        "trials": trials,
        "chosen": {"threads": chosen.threads, "prefetch": chosen.prefetch, **vars(chosen.gpu_decoder)},
        "file": str(file),
        "key": key,
    }


def settings(cores: int, device: str) -> Iterator[tuple[str, Sequence[float]]]:
    """What is tried, in order, cheapest value first."""
    threads = [n for n in (1, 2, 3, 4, 6, 8, 12, 16) if n <= cores]
    yield "workers", threads
    yield "prefetch", (1, 2, 3, 4)
    if device == "cuda":
        yield "hw_decoder_load", (0.0, 0.3, 0.5, 0.65, 0.8, 0.95)
        yield "preallocate_side", (0, 512, 1024)


def _search(start: Task, name: str, values: Sequence[float], run: Run, trials: list[dict[str, Any]], bar: Any) -> Task:
    """`start` with the value of `name` that is worth its cost."""
    changes: list[dict[str, Any]] = [{name: value} for value in values]
    tasks = [replace(start, **change) for change in changes]
    found = []
    for task, value in zip(tasks, values, strict=True):
        bar.set_postfix_str(f"{name}={value}")
        found.append(run(task))
        trials.append({name: value, **found[-1]})
        bar.update()
    fastest = max(result["images_per_s"] for result in found)
    return next(t for t, result in zip(tasks, found, strict=True) if result["images_per_s"] * _WORTH >= fastest)


def describe_tuning(report: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    for trial in report["trials"]:
        name, value = next(iter(trial.items()))
        lines.append(
            f"{name:17} {value:<5} {trial['images_per_s']:8.1f} images/s {trial['cpu_ms']:6.2f} CPU ms/image "
            f"p99 {trial['p99_ms']:6.1f} ms {trial['rss_mib']:6.0f} MiB"
        )
    chosen = ", ".join(f"{key} {value}" for key, value in report["chosen"].items())
    return "\n".join([*lines, f"chosen for {report['key']}: {chosen}; kept in {report['file']}"])
