"""Pre-training: one readable loop over optimizer steps."""

import itertools
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lut_ds.config import Recipe
from lut_ds.data.loader import PretrainLoader
from lut_ds.data.sources import ImageFolder
from lut_ds.data.views import Photometric, ViewSpec
from lut_ds.engine import state
from lut_ds.engine.build import flops_shape
from lut_ds.engine.checkpoint import CheckpointStore
from lut_ds.engine.launch import Ranks, discover_ranks, process_group
from lut_ds.engine.runfolder import open_run_folder, run_folder, tracker_id
from lut_ds.engine.schedules import ema_decay_at, lr_at, peak_lr
from lut_ds.engine.signals import StopRequest, listen
from lut_ds.engine.step import Trainer, split_batch
from lut_ds.errors import RunFault, UserError
from lut_ds.method.flops import step_flops
from lut_ds.tracking import MetricsLog, Progress, WandbMirror

# Dense bf16 peak of devices, FLOP/s; MFU is shown only where it is known.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: the run folder.
        step, steps: optimizer steps done and asked for.
        resumed_from: step of the checkpoint it continued, or None.
        stopped_by: what ended it early (a signal, here or on another rank), or None.
        loss: of the last step recorded in this process.
        images_per_second: over this process's steps, all ranks together.
    """

    folder: str
    step: int
    steps: int
    resumed_from: int | None
    stopped_by: str | None
    loss: float | None
    images_per_second: float | None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


class Schedule:
    """Learning rate and EMA decay of a step, from the recipe and the length of an epoch."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self._optim, self._epochs, self._per_epoch = recipe.optim, recipe.train.epochs, steps_per_epoch
        self._ema_base = recipe.method.ema_decay
        self.peak = peak_lr(recipe.optim.blr, recipe.train.global_batch, recipe.optim.lr_rule)
        self.total_steps = steps_per_epoch * recipe.train.epochs

    def lr(self, step: int) -> float:
        """Learning rate of a step (0-based): a function of the fractional epoch at its start."""
        return lr_at(step / self._per_epoch, self.peak, self._optim.min_lr, self._optim.warmup_epochs, self._epochs)

    def ema_decay(self, step: int) -> float:
        """EMA decay of a step (0-based), read by optimizer step so that accumulation does not change it.

        The reference reads the same cosine by micro-batch: at most one part in the number of steps further along.
        """
        return ema_decay_at(step, self.total_steps, self._ema_base)


class StepRecorder:
    """Keeps each step's metrics on the device and fetches them together, so that no step waits for the host."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = (*names, "grad_norm", "applied")
        self._pending: list[tuple[dict[str, Any], Tensor]] = []

    def add(self, record: dict[str, Any], metrics: Tensor) -> None:
        """Remember a step; `metrics` is what `Trainer.update` returned."""
        self._pending.append((record, metrics))

    def fetch(self) -> tuple[list[dict[str, Any]], bool]:
        """All remembered records with their values, and whether any rank wanted to stop."""
        if not self._pending:
            return [], False
        values = torch.stack([metrics for _, metrics in self._pending]).tolist()
        records = [
            {**record, **dict(zip(self._names, row, strict=False))}
            for (record, _), row in zip(self._pending, values, strict=True)
        ]
        self._pending.clear()
        return records, any(row[-1] > 0 for row in values)


def view_specs(recipe: Recipe) -> list[ViewSpec]:
    """The views a recipe reads."""
    data = recipe.data
    if recipe.method.name == "mae":
        return [ViewSpec("random_resized_crop", scale=data.crop_scale, hflip=data.hflip)]
    mild = ViewSpec("resize_crop", pad=data.crop_pad, hflip=data.hflip)
    brightness, contrast, saturation, hue = data.jitter
    photometric = Photometric(brightness, contrast, saturation, hue, p=data.jitter_prob) if data.photometric else None
    return [mild, replace(mild, photometric=photometric)]


def open_source(recipe: Recipe) -> ImageFolder:
    """The training images of `data.path`."""
    if recipe.data.path is None:
        raise UserError("data.path: no image folder given; add data.path=DIR, where DIR holds train/<class>/*.jpg")
    return ImageFolder(recipe.data.path, split="train")


def pretrain(recipe: Recipe, recipe_name: str) -> Outcome:
    """Run, or continue, a pre-training; the process must be one of the launcher's ranks.

    Raises:
        UserError: recipe, data or run folder cannot work.
        RunFault: disk full, unreadable data, or too many bad steps; the last good checkpoint is intact.
    """
    ranks = discover_ranks()
    _set_up_process(recipe, ranks)
    micro_batch, accumulation = split_batch(recipe.train.global_batch, recipe.train.micro_batch, ranks.world_size)
    source = open_source(recipe)
    folder = run_folder(recipe, recipe_name)
    with process_group(ranks), listen() as stop:
        _on_main(ranks, lambda: open_run_folder(folder, recipe))
        loader = PretrainLoader(
            source,
            view_specs(recipe),
            image_size=recipe.model.image_size,
            num_patches=recipe.model.patches,
            seed=recipe.run.seed,
            global_batch=recipe.train.global_batch,
            micro_batch=micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            threads=recipe.data.threads,
            prefetch=recipe.data.prefetch,
        )
        with loader:
            trainer = Trainer(recipe, ranks, micro_batch, accumulation)
            return _loop(recipe, ranks, folder, loader, trainer, stop)


def _loop(
    recipe: Recipe, ranks: Ranks, folder: Path, loader: PretrainLoader, trainer: Trainer, stop: StopRequest
) -> Outcome:
    schedule = Schedule(recipe, loader.steps_per_epoch)
    stop_step = min(schedule.total_steps, recipe.train.max_steps or schedule.total_steps)
    save_every = recipe.run.save_every or loader.steps_per_epoch
    watch = Watch(recipe, ranks, folder, trainer, loader.steps_per_epoch, stop_step)
    start = watch.resume(trainer)
    step, stopped = start, False
    batches = loader.batches(start, stop_step)
    try:
        while step < stop_step and not stopped:
            lr, decay = schedule.lr(step), schedule.ema_decay(step)
            metrics = trainer.update(
                watch.timed(itertools.islice(batches, trainer.accumulation)), lr, decay, stop.requested
            )
            step += 1
            watch.record(step, metrics, lr, decay)
            last = step == stop_step
            if last or step % recipe.run.log_every == 0 or step % save_every == 0:
                stopped = watch.flush() and not last
            if last or stopped or step % save_every == 0:
                watch.save(step, trainer)
    finally:
        batches.close()
        watch.close()
    return watch.outcome(step, (stop.signal_name or "a signal to another rank") if stopped else None)


class Watch:
    """Everything around the steps of `_loop`: metrics, progress, trackers, checkpoints, speed."""

    def __init__(
        self, recipe: Recipe, ranks: Ranks, folder: Path, trainer: Trainer, steps_per_epoch: int, stop_step: int
    ) -> None:
        self._recipe, self._ranks, self._folder = recipe, ranks, folder
        self._per_epoch, self._stop_step = steps_per_epoch, stop_step
        self._recorder = StepRecorder(trainer.metric_names)
        keep = recipe.run.keep_every_epochs
        self._store = CheckpointStore(
            folder / "checkpoints",
            ranks.rank,
            ranks.world_size,
            recipe.run.keep_last,
            keep * steps_per_epoch if keep else None,
            self._say,
        )
        self._log: MetricsLog | None = None
        self._progress: Progress | None = None
        self._wandb: WandbMirror | None = None
        self._resumed_from: int | None = None
        self._last_loss: float | None = None
        self._bad_steps = 0
        self._data_seconds = 0.0

    def resume(self, trainer: Trainer) -> int:
        """Load the newest valid checkpoint if there is one; returns the step to start from."""
        path = self._store.newest_valid()
        start = 0
        if path is not None:
            state.restore(trainer, path, self._ranks.rank)
            start = self._resumed_from = int(state.read_state(path)["step"])
        if self._ranks.main:
            self._open(start)
            if path is not None:
                self._say(f"continuing {self._folder} from {path.name}")
        self._started = self._flushed = time.monotonic()
        self._first = self._flushed_step = start
        return start

    def _open(self, start: int) -> None:
        recipe, ranks = self._recipe, self._ranks
        self._log = MetricsLog(self._folder / "metrics.jsonl", start)
        flops = step_flops(flops_shape(recipe))["total"]
        self._progress = Progress(self._stop_step, start, recipe.train.global_batch, flops, peak_flops(ranks))
        if recipe.run.wandb != "off":
            config = recipe.model_dump(mode="json")
            run_id = tracker_id(self._folder)
            self._wandb = WandbMirror(
                recipe.run.wandb, recipe.run.wandb_project, run_id, self._folder.name, self._folder, config
            )

    def timed(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The same batches; the time spent waiting for them is counted."""
        iterator = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(iterator, None)
            self._data_seconds += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def record(self, step: int, metrics: Tensor, lr: float, ema_decay: float) -> None:
        """Remember what a step measured."""
        self._recorder.add({"step": step, "epoch": step / self._per_epoch, "lr": lr, "ema_decay": ema_decay}, metrics)

    def flush(self) -> bool:
        """Write the remembered steps; True when any rank was asked to stop.

        Raises:
            RunFault: ten steps in a row had a non-finite loss or gradient.
        """
        records, stop = self._recorder.fetch()
        now = time.monotonic()
        step, seconds = records[-1]["step"], now - self._flushed
        records[-1]["images_per_s"] = (step - self._flushed_step) * self._recipe.train.global_batch / seconds
        records[-1]["data_wait"] = self._data_seconds / seconds
        self._last_loss = records[-1]["loss"]
        if self._ranks.main:
            self._publish(records)
        self._data_seconds, self._flushed, self._flushed_step = 0.0, now, step
        for record in records:
            self._bad_steps = 0 if record["applied"] else self._bad_steps + 1
        if self._bad_steps >= 10:
            raise RunFault(
                f"step {step}: {self._bad_steps} steps in a row had a non-finite loss or gradient; "
                "lower optim.blr, or remove the newest checkpoints to go back further"
            )
        return stop

    def _publish(self, records: list[dict[str, Any]]) -> None:
        assert self._log is not None
        assert self._progress is not None
        self._log.write(records)
        last = records[-1]
        names: tuple[str, ...] = ("loss", "mae", "bc", "lr")
        shown: dict[str, float] = {name: last[name] for name in names if name in last}
        self._progress.update(len(records), last["images_per_s"], {**shown, "data wait": last["data_wait"]})
        if self._wandb is not None:
            for record in records:
                self._wandb.log(record)

    def save(self, step: int, trainer: Trainer) -> None:
        """Write a checkpoint of `step`."""
        own, metadata, shared = state.collect(trainer, self._ranks.rank)
        content = {
            "epoch": step / self._per_epoch,
            "seed": self._recipe.run.seed,
            "recipe": self._recipe.model_dump(mode="json"),
        }
        self._store.save(step, own, metadata, shared, content)
        self._flushed = time.monotonic() if self._flushed_step == step else self._flushed

    def outcome(self, step: int, stopped_by: str | None) -> Outcome:
        """How the run ended."""
        seconds, steps = time.monotonic() - self._started, step - self._first
        speed = steps * self._recipe.train.global_batch / seconds if steps else None
        return Outcome(str(self._folder), step, self._stop_step, self._resumed_from, stopped_by, self._last_loss, speed)

    def close(self) -> None:
        """Close files and trackers; safe to call twice."""
        for part in (self._progress, self._wandb, self._log):
            if part is not None:
                part.close()
        self._progress = self._wandb = self._log = None

    def _say(self, text: str) -> None:
        if self._ranks.main and self._progress is not None:
            self._progress.say(text)
        elif self._ranks.main:
            print(text, flush=True)


def peak_flops(ranks: Ranks) -> float | None:
    """bf16 dense peak of all ranks' devices together, FLOP/s, where it is known."""
    if ranks.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(ranks.device)
    return next((peak * ranks.world_size for device, peak in PEAK_FLOPS.items() if device in name), None)


def _set_up_process(recipe: Recipe, ranks: Ranks) -> None:
    """Threads and determinism of this process: the same seed and world size give the same bits."""
    if ranks.device.type == "cpu":
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = recipe.precision.compute == "bf16"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _on_main(ranks: Ranks, action: Any) -> None:
    """Run `action` on rank 0; its user error is every rank's, so that none waits for the others."""
    problem: list[str | None] = [None]
    if ranks.main:
        try:
            action()
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])
