"""A sign of life of each rank: one small file in the run folder, which any rank can read when it wonders about another."""

import json
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"


@dataclass
class Place:
    """Where a rank is: doing what (`phase`) in which optimizer step (1-based)."""

    step: int
    phase: str


@dataclass(frozen=True)
class Beat:
    """What a rank's file said: its place, and `count`, which rises while the process runs at all."""

    step: int
    phase: str
    count: int
    host: str


class Heartbeat:
    """This rank's file `<run>/heartbeats/rank_00000.json`.

    Args:
        folder: the run folder.
        rank: this process's.
        launch: the same for all ranks of this start, and for no other: files of earlier starts are told apart by it.
    """

    def __init__(self, folder: Path, rank: int, launch: str) -> None:
        self._folder, self._rank, self._launch = folder / FOLDER, rank, launch
        self._count = 0
        self._host = platform.node()
        self._folder.mkdir(exist_ok=True)

    def write(self, place: Place) -> None:
        """Replace the file."""
        self._count += 1
        content = {"launch": self._launch, **asdict(Beat(place.step, place.phase, self._count, self._host))}
        file = self._file(self._rank)
        aside = file.with_name(f".{file.name}")
        aside.write_text(json.dumps(content))
        os.replace(aside, file)

    def read(self, rank: int) -> Beat | None:
        """What another rank's file says; None if it wrote none in this start."""
        try:
            content: dict[str, Any] = json.loads(self._file(rank).read_text())
            return Beat(**content) if content.pop("launch") == self._launch else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # a file that cannot be read is no sign of life

    def remove(self) -> None:
        """Take the file away: the run has ended in good order."""
        self._file(self._rank).unlink(missing_ok=True)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"


def describe(before: Mapping[int, Beat | None], after: Mapping[int, Beat | None]) -> tuple[list[int], str]:
    """Which ranks are missing, and where all are, in words.

    Args:
        before, after: two readings of all ranks, several beats apart.

    Returns:
        The missing ranks: those that show no life between the readings, or else those that are behind, or elsewhere than
        most. Then one sentence about them and one about the others.
    """
    silent = [rank for rank, beat in after.items() if beat is None or beat == before[rank]]
    missing = silent or _behind({rank: beat for rank, beat in after.items() if beat is not None})
    groups: dict[str, list[int]] = defaultdict(list)
    for rank, beat in after.items():
        last = (
            "never began"
            if beat is None
            else f"{'last seen ' if rank in silent else ''}{beat.phase} of step {beat.step}"
        )
        where = f" on {beat.host}" if beat is not None and rank in missing else ""
        groups[f"{where}: {'no sign of life, ' if rank in silent else ''}{last}"].append(rank)
    ordered = sorted(groups.items(), key=lambda group: (group[1][0] not in missing, group[1]))
    return missing, "; ".join(f"{ranks_in_words(ranks)}{what}" for what, ranks in ordered)


def _behind(beats: Mapping[int, Beat]) -> list[int]:
    """Ranks at an earlier step than the furthest one; if there is none, those in another phase than most."""
    furthest = max(beat.step for beat in beats.values())
    late = [rank for rank, beat in beats.items() if beat.step < furthest]
    if late and len(late) < len(beats):
        return late
    phases = Counter(beat.phase for beat in beats.values()).most_common()
    if len(phases) > 1 and phases[0][1] == phases[1][1]:
        # As many here as there: who waits for data keeps the others waiting, not the other way round.
        return [rank for rank, beat in beats.items() if beat.phase == WAITING]
    return [rank for rank, beat in beats.items() if beat.phase != phases[0][0]]


WAITING = "waiting for data"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-6`, `ranks 0, 2-5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
