"""Whether the teacher follows the student at all."""

from collections.abc import Iterable, Mapping
from typing import Any

MOVING = 1e-5  # least weight 1 - decay of a step that must show in the teacher, as the last steps of a run need not


class TeacherMovement:
    """Compares checksums of the teacher's weights over time.

    Args:
        steps: applied steps that must have passed before standing still is said.
    """

    def __init__(self, steps: int = 100) -> None:
        self._enough = steps
        self._seen: int | None = None
        self._moving = 0
        self._said = False

    def count(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take in the records of steps: those that were applied with a learning rate and a weight must move the teacher."""
        self._moving += sum(bool(r["applied"]) and r["lr"] > 0 and 1 - r["ema_decay"] > MOVING for r in records)

    def stuck(self, checksum: int) -> int | None:
        """Take in a checksum; returns after how many steps the teacher has not moved, the first time that is enough."""
        if checksum != self._seen:
            self._seen, self._moving, self._said = checksum, 0, False
            return None
        if self._said or self._moving < self._enough:
            return None
        self._said = True
        return self._moving
