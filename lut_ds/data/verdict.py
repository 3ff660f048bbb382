"""The results of a verification: which samples stay, which go and why, and what is odd about the rest."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.clean import write_subset
from lut_ds.data.index import INDEX_NAME
from lut_ds.data.outputs import write_lines
from lut_ds.data.parts import Part
from lut_ds.data.records import MEANINGS, Note, State
from lut_ds.data.structure import Finding, different_classes, empty_classes, ignored_files

QUARANTINE, FINDINGS, SUMMARY, CLEAN = "quarantine.jsonl", "findings.jsonl", "summary.json", "clean"
OUTPUTS = (QUARANTINE, FINDINGS, SUMMARY, CLEAN)


class Verdict:
    """What the records of all samples come to.

    Args:
        path: what was verified.
        parts: its splits.
        records: of all samples, in the order of the parts.
        said: details on the unusable ones, by sample.
        drop_duplicates: whether all but the first of byte-identical samples are unusable too.
    """

    def __init__(
        self,
        path: str,
        parts: list[Part],
        records: NDArray[np.void],
        said: Mapping[int, str],
        drop_duplicates: bool = False,
    ) -> None:
        self._path, self._parts, self._records, self._said = path, parts, records, dict(said)
        self._states: NDArray[np.uint8] = records["state"].copy()
        self._copies = duplicates(records)
        if drop_duplicates:
            self._states[list(self._copies)] = State.DUPLICATE
            self._said |= {i: f"same bytes as {self._name(first)}" for i, first in self._copies.items()}
            self._copies = {}

    def write(self, out: Path) -> dict[str, Any]:
        """Write quarantine, findings and clean indices into `out`; returns the counts for the summary."""
        bad = np.flatnonzero(self._states != State.USABLE).tolist()
        write_lines(out / QUARANTINE, (self._reason(i) for i in bad))
        found = [*self._structure(), *self._notes(), *self._duplicates()]
        write_lines(out / FINDINGS, (finding._asdict() for finding in found))
        states = Counter(self._states.tolist())
        return {
            "usable": states[State.USABLE],
            "quarantined": len(bad),
            "reasons": {state.words: states[state] for state in State if states[state] and state != State.USABLE},
            "findings": dict(Counter(finding.kind for finding in found)),
            "bytes": int(self._records["bytes"].sum(dtype=np.int64)),
            "splits": {part.split: self._clean(out / CLEAN, part) for part in self._parts},
        }

    def _clean(self, folder: Path, part: Part) -> dict[str, Any]:
        """Write the clean index of a split; what there is to say of the split."""
        usable = self._states[part.samples] == State.USABLE
        index = (folder / part.split if len(self._parts) > 1 else folder) / INDEX_NAME
        written = usable.any() and write_subset(index, part.source, usable)
        return {"samples": len(usable), "usable": int(usable.sum()), "clean_index": str(index) if written else None}

    def _reason(self, i: int) -> dict[str, str]:
        return {"name": self._name(i), "reason": State(self._states[i]).words, "detail": self._said.get(i, "")}

    def _structure(self) -> Iterator[Finding]:
        for part in self._parts:
            yield from empty_classes(part)
            yield from ignored_files(part)
        if len(self._parts) > 1:
            yield from different_classes(*self._parts)

    def _notes(self) -> Iterator[Finding]:
        for i in np.flatnonzero((self._records["notes"] != 0) & (self._states == State.USABLE)).tolist():
            record = self._records[i]
            for note in Note(int(record["notes"])):
                yield Finding(self._name(i), note.words, MEANINGS[note].format(format=record["format"].decode()))

    def _duplicates(self) -> Iterator[Finding]:
        for i, first in self._copies.items():
            across = self._part(i) is not self._part(first)
            kind = "duplicate across splits" if across else "duplicate"
            yield Finding(self._name(i), kind, f"same bytes as {self._name(first)}")

    def _part(self, i: int) -> Part:
        return next(part for part in reversed(self._parts) if i >= part.first)

    def _name(self, i: int) -> str:
        part = self._part(i)
        return part.source.name(i - part.first)


def duplicates(records: NDArray[np.void]) -> dict[int, int]:
    """The usable samples whose bytes equal those of an earlier one: sample -> the first with these bytes, ascending."""
    usable = np.flatnonzero(records["state"] == State.USABLE)
    digests = records["digest"][usable]
    order = np.lexsort((usable, digests[:, 1], digests[:, 0]))
    same = np.zeros(len(order), bool)
    same[1:] = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    firsts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    copies = {int(usable[order[k]]): int(usable[order[firsts[k]]]) for k in np.flatnonzero(same)}
    return dict(sorted(copies.items()))
