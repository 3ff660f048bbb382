"""One place of a batch: which sample fills it, and which comes next when that one is bad."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.patience import PatientReader
from lut_ds.data.quarantine import BadSample
from lut_ds.data.sources import Source
from lut_ds.data.validity import image_hw, undecodable
from lut_ds.errors import RunFault

MOST_IN_A_ROW = 1000  # bad samples, after which nothing good is expected to follow


@dataclass(frozen=True)
class Job:
    """A batch as the order has it."""

    epoch: int
    positions: NDArray[np.int64]  # [b], in the epoch's order
    samples: NDArray[np.int64]  # [b]


# The (position, sample) pairs that may stand in for the one at (epoch, position), nearest first; none: it is left out.
Successors = Callable[[int, int], Iterator[tuple[int, int]]]


@dataclass
class Slot:
    """One place of a batch and what is in it; `data` is empty in one that nothing is left to fill with."""

    epoch: int
    drawn: int  # the sample that the order puts here: it keys the view parameters and the mask
    candidates: Iterator[tuple[int, int]]
    position: int = -1  # of the sample that fills it
    sample: int = -1
    data: bytes = b""
    hw: tuple[int, int] = (0, 0)
    bad: list[BadSample] = field(default_factory=list)  # those passed over


class SlotFiller:
    """Fills slots with the first valid sample among their candidates, from many threads.

    A sample is valid when it can be read, has an acceptable header and decodes. The first two are checked by `fill`; the
    pipeline finds out about the third, and `replace_undecodable` repairs its batch. Bytes that did not decode once are
    known by their hash, so a bad file costs a decoding once a process, not once an epoch.
    """

    def __init__(
        self, source: Source, reader: PatientReader, successors: Successors | None, device_id: int | None
    ) -> None:
        self._source, self._reader, self._successors, self._device_id = source, reader, successors, device_id
        self._undecodable: dict[int, tuple[bytes, str]] = {}  # hash and reason by sample

    def fill(self, job: Job, part: slice) -> list[Slot]:
        """The slots of a part of a batch, filled.

        Raises:
            RunFault: a sample is bad and nothing may replace it, too many in a row are, or the storage is away.
        """
        slots = []
        for position, sample in zip(job.positions[part].tolist(), job.samples[part].tolist()):
            slot = Slot(job.epoch, sample, self._candidates(job.epoch, position, sample))
            self._advance(slot)
            slots.append(slot)
        return slots

    def replace_undecodable(self, slots: Sequence[Slot]) -> bool:
        """Decode each slot on its own and replace those that fail; whether there was one."""
        suspects, found = list(slots), False
        while suspects:
            reasons = list(undecodable([s.data for s in suspects], [s.hw for s in suspects], self._device_id))
            suspects = [slot for slot, reason in zip(suspects, reasons) if self._condemn(slot, reason)]
            found = found or bool(suspects)
            for slot in suspects:
                self._advance(slot)
            suspects = [slot for slot in suspects if slot.data]
        return found

    def _condemn(self, slot: Slot, reason: str | None) -> bool:
        if reason is not None:
            self._undecodable[slot.sample] = (_digest(slot.data), reason)
            self._pass_over(slot, RunFault(f"data: {self._source.name(slot.sample)}: {reason}"))
        return reason is not None

    def _candidates(self, epoch: int, position: int, sample: int) -> Iterator[tuple[int, int]]:
        yield position, sample
        if self._successors is not None:
            yield from self._successors(epoch, position)

    def _advance(self, slot: Slot) -> None:
        """Put the next candidate that reads and has a header into the slot."""
        for position, sample in slot.candidates:
            slot.position, slot.sample = position, sample
            found = self._load(sample)
            if not isinstance(found, RunFault):
                slot.data, slot.hw = found
                return
            self._pass_over(slot, found)
        slot.data = b""

    def _load(self, sample: int) -> tuple[bytes, tuple[int, int]] | RunFault:
        data = self._reader.read(sample)
        if isinstance(data, RunFault):
            return data
        name = self._source.name(sample)
        known, reason = self._undecodable.get(sample, (b"", ""))
        if known and known == _digest(data):
            return RunFault(f"data: {name}: {reason}")
        try:
            return data, image_hw(data, name)
        except RunFault as fault:
            return fault

    def _pass_over(self, slot: Slot, fault: RunFault) -> None:
        if self._successors is None:
            raise fault
        name = self._source.name(slot.sample)
        reason = str(fault).removeprefix(f"data: {name}: ")
        slot.bad.append(BadSample(name, slot.sample, slot.epoch, slot.position, reason))
        if len(slot.bad) >= MOST_IN_A_ROW:
            raise RunFault(
                f"{fault}; so were the {len(slot.bad) - 1} samples before it: see that data.path is what it should be"
            )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
