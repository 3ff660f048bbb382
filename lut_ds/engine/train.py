"""Pre-training: one readable loop over optimizer steps."""

import itertools
import os
import platform
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from lut_ds.config import Recipe, RunRecipe
from lut_ds.data.loader import Batch, StepLoader
from lut_ds.data.sources import Source
from lut_ds.engine.badsamples import BadSampleWatch
from lut_ds.engine.build import check_fp8, flops_shape
from lut_ds.engine.hostmemory import check_host_memory, keep_freed_memory
from lut_ds.engine.launch import Ranks, discover_ranks, process_group, rank_cores
from lut_ds.engine.reading import make_loader, open_source
from lut_ds.engine.runfolder import open_run_folder, run_folder
from lut_ds.engine.schedules import ema_decay_at, lr_at, peak_lr
from lut_ds.engine.signals import StopRequest, listen
from lut_ds.engine.step import Trainer, Votes, check_batch_norm, split_batch
from lut_ds.engine.stopping import StopConditions
from lut_ds.engine.warmup import check_allocation, describe_cluster
from lut_ds.engine.watch import Outcome, Watch
from lut_ds.errors import RunFault, UserError
from lut_ds.method.flops import step_flops

T = TypeVar("T")
Evaluate = Callable[[int, Callable[[str], None]], None]


class StepSchedule(Protocol):
    """What changes from step to step (0-based); `total_steps` is the length of the run."""

    total_steps: int

    def lr(self, step: int) -> float: ...
    def ema_decay(self, step: int) -> float: ...


class Schedule:
    """Learning rate and EMA decay of a step, from the recipe and the length of an epoch."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self._optim, self._epochs, self._per_epoch = recipe.optim, recipe.train.epochs, steps_per_epoch
        self._ema = (recipe.method.ema_decay, recipe.method.ema_decay_end)
        self.peak = peak_lr(recipe.optim.blr, recipe.train.global_batch, recipe.optim.lr_rule)
        self.total_steps = steps_per_epoch * recipe.train.epochs

    def lr(self, step: int) -> float:
        """Learning rate of a step (0-based): a function of the fractional epoch at its start."""
        return lr_at(step / self._per_epoch, self.peak, self._optim.min_lr, self._optim.warmup_epochs, self._epochs)

    def ema_decay(self, step: int) -> float:
        """EMA decay of a step (0-based), read by optimizer step so that accumulation does not change it.

        The reference reads the same cosine by micro-batch: at most one part in the number of steps further along.
        """
        return ema_decay_at(step, self.total_steps, *self._ema)


def pretrain(recipe: Recipe, recipe_name: str) -> Outcome:
    """Run, or continue, a pre-training; the process must be one of the launcher's ranks.

    Raises:
        UserError: recipe, data or run folder cannot work.
        RunFault: disk full, too much unreadable data, or too many bad steps; the last good checkpoint is intact.
    """
    ranks = discover_ranks()
    check_fp8(recipe, ranks.device)
    set_up_process(recipe, ranks)
    micro_batch, accumulation = split_batch(recipe.train.global_batch, recipe.train.micro_batch, ranks.world_size)
    check_batch_norm(recipe, micro_batch * ranks.world_size)
    check_host_memory(recipe, ranks, micro_batch, accumulation)
    folder = run_folder(recipe, recipe_name)
    with process_group(ranks), listen(recipe.run.stop_signals) as signals, ExitStack() as opened:
        source = on_all(lambda: open_source(recipe), name_rank=True)
        notes = warm_up(recipe, ranks, source)
        on_all(lambda: opened.enter_context(open_run_folder(folder, recipe, notes)) if ranks.main else None)
        loader = make_loader(
            recipe,
            source,
            global_batch=recipe.train.global_batch,
            micro_batch=micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
        )
        with loader:
            trainer = Trainer(recipe, ranks, micro_batch, accumulation)
            schedule = Schedule(recipe, loader.steps_per_epoch)
            flops = step_flops(flops_shape(recipe))["total"]
            return train(recipe, ranks, folder, loader, trainer, signals, schedule, flops)


def train(
    recipe: RunRecipe,
    ranks: Ranks,
    folder: Path,
    loader: StepLoader,
    trainer: Trainer,
    signals: StopRequest,
    schedule: StepSchedule,
    flops_per_image: float,
    title: str = "pretrain",
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
) -> Outcome:
    """Run, or continue, the loop over optimizer steps.

    Args:
        recipe, ranks, folder, loader, trainer: of the run; the process group exists, and the run folder is ours.
        signals: what asks to stop.
        schedule: learning rate and EMA decay by step.
        flops_per_image: of a step, for the utilisation that is shown; title: of the progress bar.
        evaluate: called on all ranks after every `evaluate_every` steps (None: every epoch) and the last step, before these
            are saved, with the steps done and a function that shows a line.
    """
    stop_step = min(schedule.total_steps, recipe.train.max_steps or schedule.total_steps)
    save_every = recipe.run.save_every or loader.steps_per_epoch
    evaluate_every = evaluate_every or loader.steps_per_epoch
    watch = Watch(
        recipe, ranks, folder, trainer, loader.steps_per_epoch, stop_step, loader.names, flops_per_image, title
    )
    step, stopped = watch.resume(trainer), False
    bad_samples = BadSampleWatch(loader, folder, ranks, recipe.data.max_bad_share, watch.say)
    stop = StopConditions(recipe, ranks, folder, signals, lambda: watch.saver.slowest, watch.say)
    batches = _batches(loader, watch, step, stop_step)
    try:
        while step < stop_step and not stopped:
            last = step + 1 == stop_step
            flushing = last or (step + 1) % recipe.run.log_every == 0 or (step + 1) % save_every == 0
            lr, decay = schedule.lr(step), schedule.ema_decay(step)
            metrics = trainer.update(
                watch.timed(itertools.islice(batches, trainer.accumulation)),
                lr,
                decay,
                Votes(stop.wanted(flushing), watch.saver.busy),
            )
            step += 1
            watch.record(step, metrics, lr, decay)
            if flushing:
                stopped = watch.flush(bad_samples) and not last
                if (back := watch.rewind(trainer)) is not None:
                    step = back
                    batches.close()
                    batches = _batches(loader, watch, step, stop_step)
                    continue  # a stop that was asked for ends the loop: what it would save is saved
            if evaluate is not None and (last or step % evaluate_every == 0):
                watch.guards.saving()
                evaluate(step, watch.say)
            if last or stopped or step % save_every == 0:
                watch.save(step, trainer, wait=last or stopped)
        return watch.outcome(step, stop.agree() if stopped else None)
    finally:
        watch.close()


def _batches(loader: StepLoader, watch: Watch, start: int, stop: int) -> Generator[Batch, None, None]:
    """The micro-batches of optimizer steps [start, stop), without the data that the run passes over."""
    for first, last in watch.guards.spans.data_ranges(start, stop):
        yield from loader.batches(first, last)


def set_up_process(recipe: RunRecipe, ranks: Ranks) -> None:
    """Memory, threads and determinism of this process: on CPUs, and with `run.deterministic`, the same seed gives the same bits."""
    if ranks.device.type == "cpu":
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(rank_cores())
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Of convolutions too, which torch computes in TF32 unless told not to.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.precision.compute == "bf16"
    torch.use_deterministic_algorithms(recipe.run.deterministic or ranks.device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def on_all(action: Callable[[], T], name_rank: bool = False) -> T:
    """Run `action` on every rank; the error of one is every rank's, so that none waits for the others.

    Args:
        action: what to run.
        name_rank: where only some ranks fail, the error says which: their node differs.
    """
    result, problem = None, None
    try:
        result = action()
    except (UserError, RunFault) as error:
        problem = (type(error), str(error), f"rank {dist.get_rank()} ({platform.node()})")
    problems: list[tuple[type[Exception], str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    failed = [p for p in problems if p is not None]
    if failed:
        kind, text, who = failed[0]
        raise kind(f"{text} [on {who}, not on all ranks]" if name_rank and len(failed) < len(problems) else text)
    return result  # type: ignore[return-value]  # no problem: the action returned


def warm_up(recipe: RunRecipe, ranks: Ranks, source: Source) -> dict[str, Any]:
    """Compare the ranks before the first step; what was found, for environment.jsonl."""
    if ranks.world_size == 1:
        return {}
    if not recipe.run.warmup_checks:
        _same_everywhere(len(source))
        return {}
    report = check_allocation(ranks, recipe, source)
    if ranks.main:
        print(describe_cluster(report), file=sys.stderr, flush=True)
    return {"cluster": report}


def _same_everywhere(images: int) -> None:
    """Refuse ranks that see different data: they would disagree about which step ends an epoch."""
    found: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(found, images)
    if len(set(found)) > 1:
        other = next(rank for rank, count in enumerate(found) if count != found[0])
        raise UserError(
            f"data.path: rank 0 finds {found[0]} images and rank {other} {found[other]}; give all nodes the same folder"
        )
