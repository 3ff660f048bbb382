"""Bad samples of a run: what is known of each, the file that lists them, and how many are too many."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lut_ds.errors import RunFault

LEAST_SEEN = 1000  # a share is taken of at least this many samples: one bad file among the first ten is no verdict


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used when the order came to it."""

    name: str  # of the source: for files, the path
    sample: int
    epoch: int
    position: int  # in the epoch's order
    reason: str


class QuarantineFile:
    """`quarantine.jsonl`: one JSON object for each bad sample, named once however often it is met. One process writes.

    Args:
        path: the file; what an earlier part of the run wrote stays, except a line that was cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = {bad.name for bad in read_quarantine(path)}

    def add(self, found: Iterable[BadSample]) -> list[BadSample]:
        """Append those that are not listed yet, and return them."""
        new = []
        for bad in found:
            if bad.name not in self._names:
                self._names.add(bad.name)
                new.append(bad)
        if new:
            with self.path.open("a+b") as file:
                lines = b"".join(json.dumps(asdict(bad)).encode() + b"\n" for bad in new)
                file.write(b"\n" + lines if _torn(self.path) else lines)
        return new


def _torn(path: Path) -> bool:
    """Whether the file ends inside a line."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def read_quarantine(path: Path) -> list[BadSample]:
    """The bad samples that a `quarantine.jsonl` lists; a line cut short by a crash is left out. Empty if there is no file."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(BadSample(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def check_share(bad: int, seen: int, most: float, examples: Sequence[BadSample]) -> None:
    """RunFault when `bad` of `seen` samples are more than the share `most` of them, or of `LEAST_SEEN` if that is more."""
    if bad > most * max(seen, LEAST_SEEN):
        example = f", for example {examples[-1].name}: {examples[-1].reason}" if examples else ""
        raise RunFault(
            f"data: {bad} of {seen} samples could not be used, more than data.max_bad_share {most:g}{example}; "
            "repair the data, `lut-ds data verify` finds what is wrong with it, or allow a larger share"
        )
