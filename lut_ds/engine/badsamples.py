"""What the ranks do together about bad samples: count them, list them once in the run folder, stop when they are too many."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from lut_ds.data.loader import StepLoader
from lut_ds.data.quarantine import BadSample, QuarantineFile, check_share
from lut_ds.engine.launch import Ranks

_NAMED = 10  # files named on the screen at a time; the quarantine file has them all


class BadSampleWatch:
    """Counts over all ranks, and RUN/quarantine.jsonl, which rank 0 writes.

    Args:
        loader: of this rank.
        folder: of the run.
        ranks: this process's place; the process group exists.
        most: `data.max_bad_share`.
        say: prints a line.
    """

    def __init__(self, loader: StepLoader, folder: Path, ranks: Ranks, most: float, say: Callable[[str], None]) -> None:
        self._loader, self._ranks, self._most, self._say = loader, ranks, most, say
        self._file = QuarantineFile(folder / "quarantine.jsonl") if ranks.main else None
        self._seen = self._bad = 0
        self._examples: list[BadSample] = []

    def gather(self) -> int:
        """Collect from all ranks, which call this together, and list what is new; bad samples since the last time."""
        new = self._loader.take_bad()
        counts = torch.tensor([self._loader.seen, self._loader.bad, len(new)], device=self._ranks.device)
        if self._ranks.world_size > 1:
            dist.all_reduce(counts)
        before = self._bad
        self._seen, self._bad, found = counts.tolist()
        if found and self._ranks.world_size > 1:
            from_ranks: list[list[BadSample]] = [[]] * self._ranks.world_size
            dist.all_gather_object(from_ranks, new)
            new = [bad for one in from_ranks for bad in one]
        if new:
            self._examples = new
            self._list(new)
        return self._bad - before

    def check(self) -> None:
        """RunFault, on every rank alike, when more than `data.max_bad_share` of what this process group saw was bad."""
        check_share(self._bad, self._seen, self._most, self._examples)

    def _list(self, found: list[BadSample]) -> None:
        if self._file is None:
            return
        try:
            new = self._file.add(found)
        except OSError as error:  # the run needs its data, not this list of it
            self._say(
                f"data: {self._file.path} cannot be written: {error.strerror or error}; bad samples are named here only"
            )
            new = found
        for bad in new[:_NAMED]:
            self._say(f"data: {bad.name}: {bad.reason}; replaced by the next in the order")
        if len(new) > _NAMED:
            self._say(f"data: {len(new) - _NAMED} more bad samples are listed in {self._file.path}")
