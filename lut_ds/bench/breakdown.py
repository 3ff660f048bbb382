"""Where the time of a step goes: its parts, timed in steps of their own, so that timing does not disturb the figures."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lut_ds.engine.step import Trainer

Span = tuple[Any, Any]  # CUDA events, or seconds
Batch = TypeVar("Batch")


class Breakdown:
    """Wraps the parts of a trainer while inside; milliseconds of each, a step.

    `data_wait` (until a batch is there), `teacher`, `student` (its encoder), `decoder`, `heads`, `losses` (masking and what
    is left of the forward pass), `backward` (with the communication that overlaps it), `optimizer` (with ZeRO's), `ema` (with
    the refresh of the teacher) and `other`; they add up to `whole`, but for a teacher on a stream of its own. On a GPU by
    events on its stream: nothing waits inside a step, and `data_wait` is what the GPU waits, not the host.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._cuda = trainer, trainer.device.type == "cuda"
        self._spans: dict[str, list[Span]] = defaultdict(list)
        self._undo: list[tuple[Any, str, Any]] = []
        self._steps = 0

    def __enter__(self) -> "Breakdown":
        trainer, student = self._trainer, self._trainer.student
        if trainer.teacher is not None:
            self._wrap(trainer.teacher, "forward", "teacher")
        self._wrap(student.encoder, "forward", "student")
        self._wrap(student.decoder, "forward", "decoder")
        if trainer.teacher is not None:
            self._wrap(student, "predict", "heads")
        self._wrap(trainer.engine, "forward", "forward")
        self._wrap(trainer.engine, "backward", "backward")
        self._wrap(trainer, "_step", "optimizer")
        if trainer.ema is not None:
            self._wrap(trainer.ema, "update", "ema")
        return self

    def __exit__(self, *exc: object) -> None:
        for owner, name, original in reversed(self._undo):
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each is there is counted."""
        while True:
            with self._span("data_wait"):
                batch = next(batches)
            yield batch

    def step(self, action: Callable[[], Tensor]) -> None:
        """Run one step and time it whole."""
        with self._span("step"):
            action()
        self._steps += 1

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds a step of each part."""
        if self._cuda:
            torch.cuda.synchronize()
        total = {name: sum(map(self._length, spans)) / self._steps * 1e3 for name, spans in self._spans.items()}
        forward, whole = total.pop("forward"), total.pop("step")
        inside = sum(total.get(name, 0.0) for name in ("student", "decoder", "heads"))
        total["losses"] = max(0.0, forward - inside)
        total["other"] = max(0.0, whole - sum(total.values()))
        return {**total, "whole": whole}

    def _length(self, span: Span) -> float:
        start, end = span
        return float(start.elapsed_time(end)) / 1e3 if self._cuda else float(end - start)

    @contextmanager
    def _span(self, name: str) -> Any:
        start = self._now()
        yield
        self._spans[name].append((start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._span(part):
                return inner(*args, **kwargs)

        self._undo.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, timed)
