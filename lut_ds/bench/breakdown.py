"""Where the time of a step goes: its parts, timed in steps of their own, so that timing does not disturb the figures."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lut_ds.engine.step import Trainer

Span = tuple[Any, Any]  # CUDA events, or seconds


class Breakdown:
    """Wraps the parts of a trainer while inside; milliseconds of each, a step.

    `teacher`, `student` (its encoder), `decoder`, `heads`, `losses` (masking and what is left of the forward pass),
    `backward` (with the communication that overlaps it), `optimizer` (with ZeRO's), `ema`, `communication` (what the host
    spends in collectives, part of the others) and `other`. On a GPU by events on its stream; nothing waits inside a step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._cuda = trainer, trainer.device.type == "cuda"
        self._spans: dict[str, list[Span]] = defaultdict(list)
        self._undo: list[tuple[Any, str, Any]] = []
        self._communication = 0.0
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
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
            self._wrap_collective(name)
        return self

    def __exit__(self, *exc: object) -> None:
        for owner, name, original in reversed(self._undo):
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

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
        total["communication"] = self._communication / self._steps * 1e3
        return total

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

    def _wrap_collective(self, name: str) -> None:
        inner = getattr(dist, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._communication += time.perf_counter() - began

        self._undo.append((dist, name, inner))
        setattr(dist, name, timed)
