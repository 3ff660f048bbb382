"""Data that a run passes over after a loss spike: which step of the data each optimizer step reads.

Without spikes step s reads data step s. A run that is rewound from step s to a checkpoint of step c reads on behind the
spike: step c takes data step s, and so on, so the data steps [c, s) are never learned from. Learning rate and EMA decay stay
functions of the optimizer step. So after a rewind an epoch of the schedule no longer begins with an epoch of the data; each
data epoch still shows every sample once, except those of the passed-over steps, and the run ends as many data steps further.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lut_ds.engine.checkpoint import write_text_atomically
from lut_ds.errors import RunFault

FILE = "skipped.json"


@dataclass(frozen=True)
class Span:
    """From optimizer step `at` (0-based) on, `length` data steps are passed over."""

    at: int
    length: int


@dataclass(frozen=True)
class SkippedSpans:
    """All spans of a run, and the rewinds that made them; a value: `rewound` returns another one.

    Attributes:
        spans: by rising `at`; several may have the same.
        rewinds: how often the run went back (spans are joined where it went back behind an earlier one).
    """

    spans: tuple[Span, ...] = ()
    rewinds: int = 0

    def data_step(self, step: int) -> int:
        """The data step (0-based) that an optimizer step (0-based) reads."""
        return step + sum(span.length for span in self.spans if span.at <= step)

    def data_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The data steps of optimizer steps [start, stop), as ranges [first, last) in their order."""
        edges = [start, *sorted({span.at for span in self.spans if start < span.at < stop}), stop]
        for low, high in itertools.pairwise(edges):
            if low < high:
                yield self.data_step(low), self.data_step(high - 1) + 1

    def rewound(self, back_to: int, spike: int) -> "SkippedSpans":
        """The spans once the run goes back to `back_to` steps done, because the step that made it `spike` was bad."""
        kept = SkippedSpans(tuple(span for span in self.spans if span.at <= back_to))
        length = self.data_step(spike - 1) + 1 - kept.data_step(back_to)
        return SkippedSpans((*kept.spans, Span(back_to, length)), self.rewinds + 1)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "SkippedSpans":
        """Back from `as_dict`."""
        return cls(tuple(Span(int(s["at"]), int(s["length"])) for s in stored["spans"]), int(stored["rewinds"]))

    def write(self, folder: Path) -> None:
        """Keep them in a run folder, before anything else of the rewind: a run killed in the middle continues alike."""
        write_text_atomically(folder / FILE, json.dumps(self.as_dict()) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "SkippedSpans | None":
        """Those of a run folder; None if it has no such file.

        Raises:
            RunFault: the file is there and cannot be read; other data than before would follow.
        """
        try:
            return cls.from_dict(json.loads((folder / FILE).read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFault(
                f"{folder / FILE}: not readable ({error}), so the data this run passes over are unknown; restore it"
            ) from error
