"""Everything around the steps: metrics, progress, trackers, checkpoints, speed; and how a run ended."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lut_ds.config import RunRecipe
from lut_ds.data.loader import Batch
from lut_ds.engine.badsamples import BadSampleWatch
from lut_ds.engine.guards.panel import Guards
from lut_ds.engine.launch import Ranks
from lut_ds.engine.runfolder import tracker_id
from lut_ds.engine.saving import Saver
from lut_ds.engine.step import NO_VOTES, Trainer, Votes
from lut_ds.errors import RunFault
from lut_ds.tracking import EventLog, MetricsLog, Progress, WandbMirror

# Dense bf16 peak of devices, FLOP/s; MFU is shown only where it is known.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: the run folder.
        step, steps: optimizer steps done and asked for.
        resumed_from: step of the checkpoint it continued, or None.
        stopped_by: what ended it early (a signal and the rank it came to, `time limit`, `stop file`), or None.
        loss: of the last step recorded in this process.
        images_per_second: over this process's steps, all ranks together.
        events: how many of each kind went to events.jsonl in this process.
    """

    folder: str
    step: int
    steps: int
    resumed_from: int | None
    stopped_by: str | None
    loss: float | None
    images_per_second: float | None
    events: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        values = asdict(self)
        return {**values, "loss": self.loss if self.loss is not None and math.isfinite(self.loss) else None}


class StepRecorder:
    """Keeps each step's metrics on the device and fetches them together, so that no step waits for the host."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = (*names, "grad_norm", "applied", "loss_limit")  # and after these the votes
        self._pending: list[tuple[dict[str, Any], Tensor]] = []

    def add(self, record: dict[str, Any], metrics: Tensor) -> None:
        """Remember a step; `metrics` is what `Trainer.update` returned."""
        self._pending.append((record, metrics))

    def fetch(self) -> tuple[list[dict[str, Any]], Votes]:
        """All remembered records with their values, and the votes: for stopping of any step, busy of the last step."""
        if not self._pending:
            return [], NO_VOTES
        values = torch.stack([metrics for _, metrics in self._pending]).tolist()
        records = [
            {**record, **dict(zip(self._names, row, strict=False))}
            for (record, _), row in zip(self._pending, values, strict=True)
        ]
        self._pending.clear()
        votes = [Votes(*(count > 0 for count in row[len(self._names) :])) for row in values]
        return records, votes[-1]._replace(stop=any(vote.stop for vote in votes))


class Watch:
    """What a run shows and keeps while `train.pretrain` loops over its steps."""

    def __init__(
        self,
        recipe: RunRecipe,
        ranks: Ranks,
        folder: Path,
        trainer: Trainer,
        steps_per_epoch: int,
        stop_step: int,
        names: Callable[[Sequence[int]], list[str]],
        flops_per_image: float,
        title: str = "pretrain",
    ) -> None:
        self._flops, self._title = flops_per_image, title
        self._recipe, self._ranks, self._folder = recipe, ranks, folder
        self._per_epoch, self._stop_step = steps_per_epoch, stop_step
        self._recorder, self._averaged = StepRecorder(trainer.metric_names), trainer.ema is not None
        self._log: MetricsLog | None = None
        self._progress: Progress | None = None
        self._wandb: WandbMirror | None = None
        self._resumed_from: int | None = None
        self._last_loss: float | None = None
        self._events = EventLog(folder / "events.jsonl") if ranks.main else None
        self.saver = Saver(recipe, ranks, folder, steps_per_epoch, self.say, self._events)
        self._event_counts: Counter[str] = Counter()
        self.guards = Guards(recipe.guard, ranks, folder, trainer, names, self._event)
        self._data_seconds = 0.0

    def resume(self, trainer: Trainer) -> int:
        """Load the newest valid checkpoint if there is one; returns the step to start from."""
        found = self.saver.find()
        start = 0
        stored: dict[str, Any] = {}
        if found is not None:
            path, stored = found
            self.saver.load(trainer, path)
            start = self._resumed_from = int(stored["step"])
            self.saver.report_resume(path, stored)
        if self._ranks.main:
            self._open(start)
        self.guards.begin(start, stored.get("guard"))
        self._started = self._flushed = time.monotonic()
        self._first = self._flushed_step = start
        return start

    def _open(self, start: int) -> None:
        recipe, ranks = self._recipe, self._ranks
        self._log = MetricsLog(self._folder / "metrics.jsonl", start)
        images = recipe.train.global_batch
        self._progress = Progress(self._stop_step, start, images, self._flops, peak_flops(ranks), self._title)
        if recipe.run.wandb != "off":
            config = recipe.model_dump(mode="json")
            run_id = tracker_id(self._folder)
            self._wandb = WandbMirror(
                recipe.run.wandb, recipe.run.wandb_project, run_id, self._folder.name, self._folder, config
            )
        if self._log.last < start:  # no crash does this: records are on the disk before their checkpoint
            lost = (
                f"metrics.jsonl: the records of steps {self._log.last + 1} to {start} are lost; the run goes on without"
            )
            self._event("metrics_lost", lost, step=start, first=self._log.last + 1)

    def timed(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The same batches; the time spent waiting for them is counted."""
        iterator = iter(batches)
        while True:
            before = time.monotonic()
            self.guards.waiting()
            batch = next(iterator, None)
            self._data_seconds += time.monotonic() - before
            if batch is None:
                return
            self.guards.read(batch.samples)
            yield batch

    def record(self, step: int, metrics: Tensor, lr: float, ema_decay: float) -> None:
        """Remember what a step measured; `ema_decay` is recorded of a run that keeps an average."""
        decay = {"ema_decay": ema_decay} if self._averaged else {}
        self._recorder.add({"step": step, "epoch": step / self._per_epoch, "lr": lr, **decay}, metrics)
        self.guards.stepped(step)

    def flush(self, bad_samples: BadSampleWatch) -> bool:
        """Write the remembered steps; True when any rank was asked to stop.

        Args:
            bad_samples: of this rank; the ranks' are gathered here.

        Raises:
            RunFault: too many bad samples, too many steps in a row were not applied, or the ranks' models differ.
        """
        records, votes = self._recorder.fetch()
        now = time.monotonic()
        step, seconds = records[-1]["step"], now - self._flushed
        records[-1]["images_per_s"] = (step - self._flushed_step) * self._recipe.train.global_batch / seconds
        records[-1]["data_wait"] = self._data_seconds / seconds
        records[-1]["bad_samples"] = bad_samples.gather()
        self._last_loss = records[-1]["loss"]
        self.guards.count(records)
        if self._ranks.main:
            self._publish(records)
        with self._fault_of_all():
            self.guards.judge(records, seconds / len(records), self._data_seconds / len(records))
            bad_samples.check()
        self._data_seconds, self._flushed, self._flushed_step = 0.0, now, step
        self.saver.advance(votes.busy)
        return votes.stop

    def rewind(self, trainer: Trainer) -> int | None:
        """Go back to the last checkpoint before a loss spike, if the last flush found one and that is asked for.

        Returns:
            The step to go on from, or None to go on as if nothing had been.
        """
        spike = self.guards.spike
        if spike is None:
            return None
        self.guards.saving()
        found = self.saver.find(before=spike["step"])
        if found is None:
            self.guards.stay()
            return None
        path, stored = found
        step = int(stored["step"])
        self.guards.rewind(step, stored.get("guard"))
        self.saver.load(trainer, path)
        if self._log is not None and self._progress is not None:
            self._log.close()
            self._log = MetricsLog(self._log.path, step)
            self._progress.back_to(step)
        self._flushed, self._flushed_step = time.monotonic(), step
        return step

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

    def save(self, step: int, trainer: Trainer, wait: bool) -> None:
        """Save `step` beside the next steps, or with `wait` before this returns."""
        self.guards.saving()
        with self._fault_of_all():
            self.guards.compare(step)
        if self._log is not None:
            self._log.sync()  # no checkpoint is ahead of the metrics, whatever fails
        self.saver.save(step, trainer, {"guard": self.guards.state()}, wait)
        self._flushed = time.monotonic() if self._flushed_step == step else self._flushed

    @contextmanager
    def _fault_of_all(self) -> Iterator[None]:
        """A fault that every rank raises here at once does not lose the save in flight, which is from before it."""
        try:
            yield
        except RunFault:
            self.saver.finish()
            raise

    def outcome(self, step: int, stopped_by: str | None) -> Outcome:
        """How the run ended."""
        if stopped_by is not None and self._events is not None:
            self._events.write("stopped", step=step, by=stopped_by)
        seconds, steps = time.monotonic() - self._started, step - self._first
        speed = steps * self._recipe.train.global_batch / seconds if steps else None
        return Outcome(
            str(self._folder),
            step,
            self._stop_step,
            self._resumed_from,
            stopped_by,
            self._last_loss,
            speed,
            dict(self._event_counts),
        )

    def close(self) -> None:
        """Close files and trackers; safe to call twice."""
        self.guards.close()
        for part in (self.saver, self._progress, self._wandb, self._log, self._events):
            if part is not None:
                part.close()
        self._progress = self._wandb = self._log = self._events = None

    def _event(self, kind: str, text: str, /, **fields: Any) -> None:
        """Show and keep something that happened to the run."""
        self._event_counts[kind] += 1
        self.say(text)
        if self._events is not None:
            self._events.write(kind, text=text, **fields)
        if self._wandb is not None:
            self._wandb.log({"step": fields["step"], f"events/{kind}": self._event_counts[kind]})

    def say(self, text: str) -> None:
        """Print a line, on rank 0, without breaking the progress bar."""
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
