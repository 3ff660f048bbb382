"""All guards of a run behind one handle: told what the loop does, judging at every flush, alike on all ranks."""

import platform
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from numpy.typing import NDArray

from lut_ds.config import Guard
from lut_ds.engine.guards.badsteps import BadSteps, Record, images, is_spike, reason
from lut_ds.engine.guards.divergence import ReplicaCheck
from lut_ds.engine.guards.heartbeat import WAITING
from lut_ds.engine.guards.movement import TeacherMovement
from lut_ds.engine.guards.spans import SkippedSpans
from lut_ds.engine.guards.vitals import GrowthWatch, StragglerWatch, Vitals, exchange, memory_in_use
from lut_ds.engine.guards.watchdog import SAVING, Watchdog
from lut_ds.engine.launch import Ranks
from lut_ds.engine.step import Trainer
from lut_ds.errors import RunFault

GIB = 2**30


class Say(Protocol):
    """Takes an event: its kind, one line about it, and fields for events.jsonl."""

    def __call__(self, kind: str, text: str, /, **fields: Any) -> None: ...


class Guards:
    """What watches a run. Every method is called on every rank, with the same records.

    Args:
        config: the recipe's `guard` section.
        ranks: this process's place.
        folder: the run folder.
        trainer: what is trained.
        names: what to call samples in a message.
        say: takes events; rank 0's are shown and kept.

    Attributes:
        spans: the data that the run passes over.
        spike: the record of a step that the run should be rewound behind, or None.
    """

    def __init__(
        self,
        config: Guard,
        ranks: Ranks,
        folder: Path,
        trainer: Trainer,
        names: Callable[[Sequence[int]], list[str]],
        say: Say,
    ) -> None:
        self._config, self._ranks, self._folder, self._trainer = config, ranks, folder, trainer
        self._names, self._say = names, say
        self._samples: dict[int, list[int]] = {}  # this rank's, of the steps since the last flush
        self._step = 0
        self._bad_steps = BadSteps(config.max_bad_steps)
        self._replicas, self._movement = ReplicaCheck(trainer), TeacherMovement()
        self._stragglers = StragglerWatch(config.straggler_factor) if config.straggler_factor else None
        growing = range(ranks.world_size if config.memory_growth else 0)
        self._growth = [GrowthWatch(config.memory_growth or 0.0) for _ in growing]
        self._watchdog: Watchdog | None = None
        self.spans = SkippedSpans()
        self.spike: Record | None = None
        self._judged: Sequence[Record] = ()

    def begin(self, step: int, stored: Record | None) -> None:
        """Watch from here: `step` steps are done, and `stored` is their checkpoint's `state` (None: there is none)."""
        copied = SkippedSpans.from_dict(stored["skipped"]) if stored else SkippedSpans()
        self._load(step, stored)
        about: list[Any] = [None] * self._ranks.world_size
        own = (uuid.uuid4().hex, SkippedSpans.read(self._folder)) if self._ranks.main else None
        dist.all_gather_object(about, (platform.node(), own))
        self._hosts = [host for host, _ in about]
        launch, kept = about[0][1]
        self.spans = kept or copied
        if self._config.hang_seconds:
            self._watchdog = Watchdog(
                self._folder, self._ranks.rank, self._ranks.world_size, launch, self._config.hang_seconds, step
            )

    def waiting(self) -> None:
        """The loop waits for data now."""
        self._at(WAITING)

    def read(self, samples: NDArray[Any]) -> None:
        """The loop got a micro-batch of these samples, and computes now."""
        self._samples.setdefault(self._step + 1, []).extend(samples.tolist())
        self._at("computing")

    def stepped(self, step: int) -> None:
        """The loop has queued all of a step (1-based)."""
        self._step = step
        if self._watchdog is not None:
            self._watchdog.done(step)
        if self._config.hash_every and step % self._config.hash_every == 0:
            self._replicas.start(step)

    def saving(self) -> None:
        """The loop writes or reads a checkpoint now."""
        self._at(SAVING)

    def compare(self, step: int) -> None:
        """Compare the ranks before `step` is saved: what they disagree about must not take a good checkpoint's place.

        Raises:
            RunFault: they hold different models.
        """
        if self._config.hash_every:
            self._replicas.start(step)
            self._replicas.finish()

    def count(self, records: Sequence[Record]) -> None:
        """Add to the records of a flush what the guards know about each step."""
        self._bad_steps.count(records)
        if self._trainer.window is None:
            for record in records:
                del record["loss_limit"]

    def judge(self, records: Sequence[Record], step_seconds: float, data_seconds: float) -> None:
        """Look at the steps since the last flush; sets `spike` where the run should go back.

        Args:
            records: of these steps, after `count`.
            step_seconds, data_seconds: means over them, in all and waiting for data.

        Raises:
            RunFault: too many bad steps, or ranks that hold different models.
        """
        teacher = self._replicas.finish()
        if self._config.spike == "rewind":
            self.spike, self._judged = next((r for r in records if is_spike(r)), None), records
            if self.spike is not None:
                return  # what came after it will not have been
        self._judge_steps(records)
        if self._trainer.teacher is not None:
            self._judge_teacher(records, teacher)
        own = Vitals(self._trainer.clock.take() / len(records), data_seconds, memory_in_use(self._trainer.device))
        self._judge_ranks(exchange(own, self._trainer.device), step_seconds)

    def _judge_teacher(self, records: Sequence[Record], checksum: int | None) -> None:
        self._movement.count(records)
        if checksum is not None and (steps := self._movement.stuck(checksum)):
            self._tell(
                "teacher",
                f"the teacher's weights have not changed in {steps} applied steps, although the EMA decay is below 1",
                steps=steps,
            )

    def stay(self) -> None:
        """There is no checkpoint to go back to: the spike is a step that was not applied, and no more."""
        assert self.spike is not None
        step, self.spike = self.spike["step"], None
        self._tell("spike", f"step {step}: loss spike, and no checkpoint before it to go back to", step=step)
        self._judge_steps(self._judged)

    def rewind(self, step: int, stored: Record | None) -> None:
        """Go back behind the spike to `step` steps done, and pass over the data in between; `stored` as in `begin`.

        Raises:
            RunFault: it went back too often.
        """
        assert self.spike is not None
        spike, done, most = self.spike, self.spans.rewinds, self._config.max_rewinds
        seen = self._names(self._samples.get(spike["step"], []))
        text = f"step {spike['step']}: {reason(spike)}{images(seen)}"
        if done >= most:
            raise RunFault(
                f"{text}; the run went back {done} times before. Continue with guard.max_rewinds raised, with "
                "guard.spike=skip, or in a new run.dir with a lower optim.blr"
            )
        self.spans = self.spans.rewound(step, spike["step"])
        if self._ranks.main:
            self.spans.write(self._folder)
        text += (
            f": back to step {step}, {spike['step'] - step} steps of data are passed over (rewind {done + 1} of {most})"
        )
        fields = {"loss": spike["loss"], "limit": spike["loss_limit"], "images": seen}
        self._tell("rewind", text, step=spike["step"], back_to=step, **fields)
        self.spike = None
        self._samples.clear()
        self._trainer.clock.take()
        self._load(step, stored)
        if self._watchdog is not None:
            self._watchdog.done(step)

    def state(self) -> Record:
        """For a checkpoint: equal on all ranks, and all that the next steps' judgement depends on."""
        window = self._trainer.window
        return {
            "bad_steps": self._bad_steps.state(),
            "losses": window.state() if window is not None else [],
            "skipped": self.spans.as_dict(),
        }

    def close(self) -> None:
        """Stop watching."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def _load(self, step: int, stored: Record | None) -> None:
        self._step = step
        self._bad_steps.load(stored["bad_steps"] if stored else {})
        if self._trainer.window is not None:
            self._trainer.window.load(stored["losses"] if stored else [])

    def _at(self, phase: str) -> None:
        if self._watchdog is not None:
            self._watchdog.at(phase)

    def _tell(self, kind: str, text: str, **fields: Any) -> None:
        self._say(kind, text, **{"step": self._step, **fields})

    def _judge_steps(self, records: Sequence[Record]) -> None:
        bad = [record for record in records if not record["applied"]]
        if bad:
            seen = self._names(self._samples.get(bad[-1]["step"], []))
            steps = [record["step"] for record in bad]
            self._tell("bad_steps", self._bad_steps.describe(bad, seen), step=steps[-1], steps=steps, images=seen)
            self._bad_steps.check(seen)
        for record in records:
            if is_spike(record) and record["applied"]:
                seen = self._names(self._samples.get(record["step"], []))
                fields = {"loss": record["loss"], "limit": record["loss_limit"], "images": seen}
                text = f"step {record['step']}: loss spike: {reason(record)}{images(seen)}"
                self._tell("spike", text, step=record["step"], **fields)
        self._samples.clear()

    def _judge_ranks(self, vitals: Sequence[Vitals], step_seconds: float) -> None:
        for slow in self._stragglers.feed(vitals, step_seconds) if self._stragglers else []:
            host = self._hosts[slow.rank]
            text = (
                f"rank {slow.rank} on {host} keeps the others waiting: {slow.seconds:.3g} s a step {slow.cause}, "
                f"{slow.median:.3g} s on the median rank"
            )
            self._tell("straggler", text, host=host, **asdict(slow))
        for rank, watch in enumerate(self._growth):
            if (grown := watch.feed(self._step, vitals[rank].memory)) is not None:
                host, (steps, before, now) = self._hosts[rank], grown
                text = (
                    f"memory of rank {rank} on {host} grows: {before / GIB:.3g} to {now / GIB:.3g} GiB in {steps} steps, "
                    f"{(now - before) / steps / 2**20:.3g} MiB a step"
                )
                self._tell("memory", text, rank=rank, host=host, before=before, now=now, steps=steps)
