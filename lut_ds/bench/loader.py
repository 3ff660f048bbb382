"""The loader's benchmark: ours and others on the same files, views and workers, in rounds, each in its own process."""

import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lut_ds.bench.contenders import CONTENDERS, missing
from lut_ds.bench.loader_run import Task
from lut_ds.bench.machine import describe_machine
from lut_ds.bench.rounds import Figures, compare, run_apart, run_rounds, summarise
from lut_ds.config import Recipe
from lut_ds.data.sources import Source
from lut_ds.engine.reading import open_source
from lut_ds.errors import RunFault, UserError

GENERATED = 256  # photographs, where no data set is named


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        batch_size: images a batch.
        workers: threads of ours, processes of the others.
        batches, warmup: batches that count in a round, and batches before them.
        rounds: every contender runs once in each; ratios are taken within a round.
        step_ms: time the consumer spends on each batch, as a training step would; 0 measures the loader alone.
        device: `cpu`, `cuda`, or `auto`.
        only: contenders to run; all by default.
    """

    batch_size: int = 64
    workers: int = 2
    batches: int = 8
    warmup: int = 2
    rounds: int = 3
    step_ms: float = 0.0
    device: str = "auto"
    only: tuple[str, ...] = tuple(CONTENDERS)


def bench_loader(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Measure every contender that can run here.

    Args:
        recipe: its views, image size and data.path are used; without a path, photographs are generated.

    Returns:
        `machine`, `options`, `data`; `who_decodes`: see there; `loaders`: by name the median and spread over rounds of
        what `loader_run.measure` returns; `ratios`: ours over each other's `cpu_ms` and `images_per_s`, within rounds;
        `left_out`: why not.

    Raises:
        UserError: a contender or device that does not exist here. RunFault: a loader failed.
    """
    device = choose_device(options.device)
    if unknown := [name for name in options.only if name not in CONTENDERS]:
        raise UserError(f"--only: expected some of {', '.join(CONTENDERS)}, found {unknown[0]!r}")
    with tempfile.TemporaryDirectory(prefix="lut-ds-bench-") as work:
        recipe, data = with_data(recipe, Path(work))
        left_out = {name: why for name in options.only if (why := missing(name, recipe))}
        names = [name for name in options.only if name not in left_out]
        if not names:
            raise UserError(f"bench loader: nothing to run: {'; '.join(left_out.values())}")
        task = make_task(recipe, options, device, work)
        source = open_images(recipe, options.batch_size)
        decoders = who_decodes(source)
        rounds = run_rounds({n: replace(task, contender=n) for n in names}, options.rounds, run_task, "loaders")
    return {
        "machine": describe_machine(),
        "options": {**options.__dict__, "device": device, "image_size": recipe.model.image_size},
        "data": data,
        "who_decodes": decoders,
        "loaders": {name: summarise([results[name] for results in rounds]) for name in names},
        "ratios": compare(rounds, "ours", ("cpu_ms", "images_per_s")),
        "left_out": left_out,
    }


def choose_device(wanted: str) -> str:
    """`cpu` or `cuda`; UserError when there is no such device here."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, found {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda asked for, but torch finds no CUDA device here; leave it out")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def with_data(recipe: Recipe, work: Path) -> tuple[Recipe, str]:
    """The recipe with a data set to read, and what that is."""
    if recipe.data.path is not None:
        return recipe, recipe.data.path
    from lut_ds.bench.photos import write_photos

    path = str(write_photos(work / "photos", GENERATED))
    data = recipe.data.model_copy(update={"path": path})
    return recipe.model_copy(update={"data": data}), f"{GENERATED} generated photographs, 500x375"


def open_images(recipe: Recipe, batch_size: int) -> Source:
    """What the loaders will read; UserError when it does not fill a batch."""
    source = open_source(recipe)
    if len(source) < batch_size:
        raise UserError(
            f"--batch: expected at most the {len(source)} images of {recipe.data.path}, found {batch_size}; give a smaller one"
        )
    return source


def who_decodes(source: Source, most: int = 512) -> dict[str, int]:
    """What a GPU's decoder does with the images of a source, by their headers: an even selection of at most `most`.

    Baseline JPEGs can go to the `hardware` decoder, other JPEGs fall back to `cuda`, other formats to the `cpu`; files
    that are no image are `unreadable`.
    """
    counts = dict.fromkeys(("hardware", "cuda", "cpu", "unreadable"), 0)
    for i in range(0, len(source), max(1, len(source) // most)):
        try:
            with Image.open(io.BytesIO(source.read(i))) as image:
                plain = image.mode in ("RGB", "L") and "progressive" not in image.info
                counts["cpu" if image.format != "JPEG" else "hardware" if plain else "cuda"] += 1
        except (OSError, RunFault, SyntaxError, ValueError):
            counts["unreadable"] += 1
    return counts


def make_task(recipe: Recipe, options: Options, device: str, work: str) -> Task:
    """The task of our own loader with these options."""
    return Task(
        contender="ours",
        recipe=recipe.model_dump(mode="json"),
        batch_size=options.batch_size,
        workers=options.workers,
        batches=options.batches,
        warmup=options.warmup,
        step_ms=options.step_ms,
        device=device,
        work=work,
    )


def run_task(task: Task) -> Figures:
    """Run a task in a process of its own; RunFault when it fails."""
    return run_apart("lut_ds.bench.loader_run", task, task.contender)


def describe_loader_bench(report: dict[str, Any]) -> str:
    """The result for people: a line a loader."""
    lines = [f"{'loader':12} {'images/s':>9} {'CPU ms/image':>13} {'p50 ms':>8} {'p99 ms':>8} {'stall':>6} {'MiB':>6}"]
    for name, found in report["loaders"].items():
        m = {key: value["median"] for key, value in found.items()}
        lines.append(
            f"{name:12} {m['images_per_s']:9.1f} {m['cpu_ms']:13.2f} {m['p50_ms']:8.1f} {m['p99_ms']:8.1f} "
            f"{m['stall']:6.0%} {m['rss_mib']:6.0f}"
        )
    for name, ratio in report["ratios"].items():
        cpu, speed = ratio["cpu_ms"], ratio["images_per_s"]
        lines.append(
            f"ours / {name}: CPU time {cpu['median']:.2f} ({cpu['min']:.2f}-{cpu['max']:.2f}), "
            f"images/s {speed['median']:.2f} ({speed['min']:.2f}-{speed['max']:.2f})"
        )
    lines += [f"left out: {name}: {why}" for name, why in report["left_out"].items()]
    return "\n".join(lines)
