"""One training step, measured in a process of its own: `python -m lut_ds.bench.step_run` reads a task, prints a result."""

import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lut_kernels import kernels_mode
from torch import Tensor

from lut_ds.bench.breakdown import Breakdown
from lut_ds.bench.expert import Expert
from lut_ds.bench.peers import time_peer
from lut_ds.bench.profiling import communication_ms, write_trace
from lut_ds.bench.rounds import Figures
from lut_ds.config import Recipe, parse_recipe
from lut_ds.engine.hostmemory import keep_freed_memory
from lut_ds.engine.launch import Ranks, discover_ranks, process_group
from lut_ds.engine.reading import draws_per_sample, make_loader, open_source
from lut_ds.engine.step import Trainer, split_batch
from lut_ds.method.lut import IMAGENET_MEAN, IMAGENET_STD

OUT_OF_MEMORY = "out_of_memory"
# What has no class of its own: torch's allocator on CPUs; CUDA, Triton and NCCL; cuBLAS and cuDNN.
_NO_ROOM = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
_SETS = 4  # inputs in rotation, so that no cache answers for the memory


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        side: `ours`, `expert`, or a published implementation, `lut` or `mae`.
        recipe: the recipe as JSON values; train.global_batch images a step over all ranks.
        steps, warmup: steps that count, and steps before them.
        threads: of torch on a CPU; 0 leaves its default.
        kernels: the side of each operator that ours is forced to, as LUT_KERNELS; None leaves it to that variable.
        files: the images are those of data.path, through the loader of a run, and not noise that is ready.
        breakdown: also time the parts of ours, in steps of their own.
        trace: file for a torch profiler trace of two steps of ours, opened in a browser at ui.perfetto.dev.
        checkout: folder of a published implementation.
        memory: bytes that ours may take, of the GPU's or else of the machine's memory; with it, running out is a result.
    """

    side: str
    recipe: dict[str, Any]
    steps: int
    warmup: int
    threads: int = 0
    kernels: str | None = None
    files: bool = False
    breakdown: bool = False
    trace: str | None = None
    checkout: str | None = None
    memory: float | None = None


@dataclass
class Synthetic:
    """A micro-batch of noise images."""

    views: list[Tensor]
    noise: Tensor
    draws: Tensor | None = None


def synthetic_batches(recipe: Recipe, batch: int, device: torch.device) -> Iterator[Synthetic]:
    """Endless uint8 views [b, S, S, 3] of noise on the device, several sets in rotation."""
    draws = draws_per_sample(recipe)
    m, generator = recipe.model, torch.Generator().manual_seed(recipe.run.seed)
    shape = (batch, recipe.view_side, recipe.view_side, 3)
    sets = [
        Synthetic(
            [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device) for _ in views],
            torch.rand(batch, m.patches, generator=generator).to(device),
            torch.rand(batch, draws, generator=generator).to(device) if draws else None,
        )
        for views in [range(recipe.method.views)] * _SETS
    ]
    while True:
        yield from sets


def normalised(views: list[Tensor]) -> list[Tensor]:
    """uint8 [b, S, S, 3] -> float32 [b, 3, S, S], as a torchvision loader hands them over."""
    device = views[0].device
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return [((view.permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous() for view in views]


def measure(task: Task) -> Figures:
    """Run the steps.

    Returns:
        `step_ms`, `images_per_s` (over all ranks), `memory_mib` (a GPU's peak; on CPUs the process's), `loss` of the last
        step; where a breakdown was asked for `ms_<part>` of steps of their own, which add up to `ms_whole`, and
        `ms_communication` (beside and inside the others).
    """
    if task.threads:
        torch.set_num_threads(task.threads)
    recipe = parse_recipe(task.recipe, "benchmark")
    with ExitStack() as group:
        if task.kernels is not None:
            group.enter_context(kernels_mode(task.kernels))
        ranks = discover_ranks()
        if ranks.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = recipe.precision.compute == "bf16"
        if task.side == "ours":
            group.enter_context(process_group(ranks))
            return _measure_ours(task, recipe, ranks, group)
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)
        if task.side == "expert":
            return _measure_expert(task, recipe, ranks.device)
        return _measure_peer(task, recipe, ranks.device)


def _files(recipe: Recipe, micro_batch: int, ranks: Ranks, stack: ExitStack) -> Iterator[Any]:
    """Batches of `data.path` through the loader of a run, which closes with the stack."""
    batch = recipe.train.global_batch
    loader = make_loader(
        recipe,
        open_source(recipe),
        global_batch=batch,
        micro_batch=micro_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
    )
    return stack.enter_context(loader).batches(0, 1 << 40)


def _measure_ours(task: Task, recipe: Recipe, ranks: Ranks, group: ExitStack) -> Figures:
    if ranks.device.type == "cpu":
        keep_freed_memory()  # as every run of ours begins
    if task.memory is not None:
        _limit_memory(task.memory, ranks.device)
    micro, accumulation = split_batch(recipe.train.global_batch, recipe.train.micro_batch, ranks.world_size)
    trainer = Trainer(recipe, ranks, micro, accumulation)
    batches = _files(recipe, micro, ranks, group) if task.files else synthetic_batches(recipe, micro, ranks.device)
    source = batches

    def step() -> Tensor:
        return trainer.update(itertools.islice(source, trainer.accumulation), 1e-4, 0.996)[0]

    figures = _timed(step, task, recipe.train.global_batch, ranks.device)
    if task.breakdown:
        with Breakdown(trainer) as parts:
            source = parts.waiting(batches)
            for _ in range(max(2, task.steps // 2)):
                parts.step(step)
        source = batches
        found = {**parts.milliseconds(), "communication": communication_ms(step, ranks.device)}
        figures |= {f"ms_{name}": ms for name, ms in found.items()}
    if task.trace is not None:
        write_trace(step, Path(task.trace), ranks.device, ranks.main)
    return figures


def _measure_expert(task: Task, recipe: Recipe, device: torch.device) -> Figures:
    torch.manual_seed(recipe.run.seed)
    expert = Expert(recipe, device, recipe.train.compile is True)
    source = synthetic_batches(recipe, recipe.train.global_batch, device)
    ready = [(torch.cat(normalised(b.views)), b.noise) for b in (next(source) for _ in range(_SETS))]
    turns = (ready[i % _SETS] for i in range(1 << 30))
    return _timed(lambda: expert.step(*next(turns)), task, recipe.train.global_batch, device)


def _measure_peer(task: Task, recipe: Recipe, device: torch.device) -> Figures:
    assert task.checkout is not None
    source = synthetic_batches(recipe, recipe.train.global_batch, device)
    sets = [normalised(next(source).views) for _ in range(_SETS)]
    batches = [sets[i % _SETS] for i in range(task.warmup + task.steps)]
    result = time_peer(task.side, Path(task.checkout), recipe, batches, device, task.warmup)
    return _figures(result["seconds"], task.steps, recipe.train.global_batch, result["loss"], device)


def _timed(step: Callable[[], Tensor], task: Task, images: int, device: torch.device) -> Figures:
    for _ in range(task.warmup):
        step()
    _wait(device)
    began = time.perf_counter()
    for _ in range(task.steps):
        loss = step()
    _wait(device)
    return _figures(time.perf_counter() - began, task.steps, images, float(loss), device)


def _figures(seconds: float, steps: int, images: int, loss: float, device: torch.device) -> Figures:
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()
    return {
        "step_ms": seconds / steps * 1e3,
        "images_per_s": images * steps / seconds,
        "memory_mib": peak / 2**20,
        "loss": loss,
    }


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_within(task: Task) -> Figures:
    """As `measure`; {"out_of_memory": 1.0} when `task.memory` does not suffice."""
    try:
        return measure(task)
    except (torch.OutOfMemoryError, MemoryError):
        return {OUT_OF_MEMORY: 1.0}
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_ROOM):
            raise
        return {OUT_OF_MEMORY: 1.0}


def _limit_memory(size: float, device: torch.device) -> None:
    """Let this process take `size` more bytes, of the GPU's or else of the machine's memory.

    Only once threads and libraries are there: some of them wait for ever for a thread that there is no memory for.
    """
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.mem_get_info(device)[1]), device)
        return
    torch.ones(1 << 20).sqrt_()  # starts torch's threads
    status = Path("/proc/self/status").read_text().splitlines()
    now = 1024 * int(next(line.split()[1] for line in status if line.startswith("VmData")))
    resource.setrlimit(resource.RLIMIT_DATA, (now + int(size), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def main() -> None:
    """Read a task from standard input, measure, print the result as the last line of standard output."""
    task = Task(**json.load(sys.stdin))
    print(json.dumps(measure(task) if task.memory is None else measure_within(task)), flush=True)


if __name__ == "__main__":
    main()
