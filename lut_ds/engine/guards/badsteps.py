"""Steps that were not applied, or should not have been: counted, said in one line a flush, and when it is too many."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lut_ds.errors import RunFault

Record = dict[str, Any]
SHOWN = 3  # sample names in a line


def is_spike(record: Mapping[str, Any]) -> bool:
    """Whether a step's loss was above its limit (a loss that is no number is no spike)."""
    limit = record.get("loss_limit")
    return limit is not None and record["loss"] > limit


def reason(record: Mapping[str, Any]) -> str:
    """What was wrong with a step, in words."""
    if not math.isfinite(record["loss"]):
        return f"the loss is {record['loss']}"
    if is_spike(record):
        return f"the loss {record['loss']:.4g} is above its limit {record['loss_limit']:.4g}"
    return "the gradient is not finite"


class BadSteps:
    """Counts steps that were not applied.

    Args:
        most: in a row, until the run must stop.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._total = self._in_row = 0
        self._too_many: Record | None = None

    def count(self, records: Sequence[Record]) -> None:
        """Take in steps, in their order; each record gets `bad_steps`, the number of steps not applied so far."""
        for record in records:
            self._in_row = 0 if record["applied"] else self._in_row + 1
            self._total += not record["applied"]
            record["bad_steps"] = self._total
            if self._in_row == self._most:
                self._too_many = record

    def describe(self, bad: Sequence[Record], names: Sequence[str]) -> str:
        """One line about the steps of a flush that were not applied; `names` are rank 0's samples of the last one."""
        first, last = bad[0]["step"], bad[-1]["step"]
        steps = f"step {last}" if first == last else f"{len(bad)} steps from {first} to {last}"
        return f"{steps} not applied: {reason(bad[-1])}{images(names)} ({bad[-1]['bad_steps']} such steps so far)"

    def check(self, names: Sequence[str]) -> None:
        """Raise RunFault once too many steps in a row were not applied."""
        if self._too_many is not None:
            record = self._too_many
            raise RunFault(
                f"step {record['step']}: {self._most} steps in a row were not applied; in the last {reason(record)} at a "
                f"learning rate of {record['lr']:.4g}{images(names)}. Look at these images and at metrics.jsonl, then start "
                "again in a new run.dir with a lower optim.blr, or remove the newest checkpoints to go back further; "
                "guard.max_bad_steps allows more"
            )

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"total": self._total, "in_row": self._in_row}

    def load(self, stored: Mapping[str, int]) -> None:
        """Continue counting from a checkpoint's `state`."""
        self._total, self._in_row, self._too_many = stored.get("total", 0), stored.get("in_row", 0), None


def images(names: Sequence[str]) -> str:
    """The samples of a batch, in a few words."""
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"; rank 0 read {', '.join(names[:SHOWN])}{more}"
