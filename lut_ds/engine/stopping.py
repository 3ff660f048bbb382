"""Why a run stops before its last step: a signal, the approach of the time limit, a stop file."""

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from lut_ds.config import RunRecipe
from lut_ds.engine.launch import Ranks
from lut_ds.engine.signals import StopRequest
from lut_ds.engine.timelimit import end_time

LEAST_EXTENSION = 60.0  # seconds: below it is the coarseness of what Slurm says


class StopConditions:
    """This rank's reasons to stop, asked before every step; rank 0 watches clock and file for all.

    Args:
        recipe: with `run.time_limit` and `run.stop_margin`.
        ranks: this process's place.
        folder: the run folder; a file named `stop` there asks the run to stop.
        signals: what signals asked for.
        save_seconds: how long a save takes from its step to the disk, as far as measured.
        say: shows a line.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        ranks: Ranks,
        folder: Path,
        signals: StopRequest,
        save_seconds: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._ranks, self._signals, self._save_seconds = ranks, signals, save_seconds
        self._file = folder / "stop"
        self._log_every, self._margin = recipe.run.log_every, recipe.run.stop_margin
        self._limit, self._say = recipe.run.time_limit, say
        self._end = end_time(self._limit) if ranks.main else None
        self._reason: str | None = None
        self._last, self._step_seconds = time.monotonic(), 0.0
        if self._end is not None:
            left = max(0.0, self._end - time.time())
            say(
                f"time limit in {left / 60:.0f} minutes: the run saves and stops before it"
                if left > self._margin
                else f"time limit in {left:.0f} s, less than run.stop_margin {self._margin:g} s: the run stops after its "
                "first steps; lower run.stop_margin, or allow more time"
            )

    def wanted(self, flushing: bool) -> bool:
        """Whether this rank wants to stop; its vote in the step that comes now.

        Args:
            flushing: whether votes are counted after this step; only then is the file looked for.
        """
        now = time.monotonic()
        # The slowest of recent steps: one that also saved or waited for data says what the next may take.
        self._step_seconds = max(now - self._last, 0.9 * self._step_seconds)
        self._last = now
        if self._reason is None:
            self._reason = self._signals.signal_name or self._of_main(flushing)
        return self._reason is not None

    def _of_main(self, flushing: bool) -> str | None:
        if not self._ranks.main:
            return None
        if self._end is not None and self._end - time.time() < self.needed() and not self._extended():
            return "time limit"
        return "stop file" if flushing and self._file.exists() else None

    def _extended(self) -> bool:
        """Whether the job was given more time since it started; asked once, when there is none left."""
        assert self._end is not None
        end = end_time(self._limit, again=True)
        if end is None or end < self._end + LEAST_EXTENSION:
            return False
        self._end = end
        self._say("the time limit was extended: the run goes on")
        return True

    def needed(self) -> float:
        """Seconds before the time limit at which to stop: steps up to the next count of votes, a save, and the margin."""
        return (self._log_every + 1) * self._step_seconds + 2 * self._save_seconds() + self._margin

    def agree(self) -> str:
        """The reason of the first rank that has one, once the ranks stopped together; takes the stop file away.

        A collective.
        """
        reasons: list[str | None] = [None] * self._ranks.world_size
        dist.all_gather_object(reasons, self._reason or self._signals.signal_name)
        rank, reason = next(((r, text) for r, text in enumerate(reasons) if text), (0, "a request"))
        if self._ranks.main:
            self._file.unlink(missing_ok=True)
        return reason if rank == 0 else f"{reason} to rank {rank}"
