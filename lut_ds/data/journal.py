"""What a verification has found so far, on disk: a process that is killed loses at most the chunks under way."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.outputs import hold, writable_folder
from lut_ds.data.records import RECORD, Details, State
from lut_ds.errors import UserError

_IDENTITY, _RECORDS, _DETAILS = "journal.json", "journal.records", "journal.details"
LISTINGS = {"train": "journal.train.lut", "val": "journal.val.lut"}  # what the workers read
OWN = (_IDENTITY, _RECORDS, _DETAILS, *LISTINGS.values())


class Journal:
    """One record a sample in a mapped file of `len(samples)` records, and the words on bad ones beside it.

    Args:
        folder: where the files are; made when missing.
        identity: what is examined and how; a journal with another identity is started anew.
        count: samples.

    Raises:
        UserError: another process holds the journal, or the folder cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], count: int) -> None:
        self._folder = folder
        writable_folder(folder)
        self._lock = os.open(folder / _RECORDS, os.O_RDWR | os.O_CREAT, 0o666)
        if not hold(self._lock):
            os.close(self._lock)
            raise UserError(
                f"{folder}: expected no other verification there, found one that runs; wait for it, or give another --out"
            )
        if self._identity() != dict(identity) or os.fstat(self._lock).st_size != count * RECORD.itemsize:
            self._start(identity, count)
        self.records: NDArray[np.void] = np.memmap(folder / _RECORDS, RECORD, "r+", shape=(count,))
        self._said = (folder / _DETAILS).open("a")

    def pending(self) -> NDArray[np.int64]:
        """The samples that are not examined yet, ascending."""
        return np.flatnonzero(self.records["state"] == State.PENDING)

    def write(self, samples: NDArray[np.int64], found: Details, offset: int = 0) -> None:
        """Keep what was found of `samples`, which are `offset` further along in the journal."""
        if found.said:
            self._said.writelines(json.dumps([offset + i, text]) + "\n" for i, text in found.said.items())
            self._said.flush()
        self.records[offset + samples] = (
            found.records
        )  # after the words: a record without them would have none for ever

    def details(self) -> dict[int, str]:
        """The words on bad samples."""
        said = {}
        for line in (self._folder / _DETAILS).read_text().splitlines():
            try:
                sample, text = json.loads(line)
            except ValueError:  # cut short by a crash; its sample is still pending
                continue
            said[sample] = text
        return said

    def close(self) -> None:
        """Give the journal up; it can be taken up again. May be called again."""
        if not self._said.closed:
            self._said.close()
            os.close(self._lock)

    def remove(self) -> None:
        """Close and delete the journal."""
        for name in OWN:
            (self._folder / name).unlink(missing_ok=True)
            for aside in self._folder.glob(f".{name}.*"):  # of a process that was killed while it wrote
                aside.unlink(missing_ok=True)
        self.close()

    def _identity(self) -> Any:
        try:
            return json.loads((self._folder / _IDENTITY).read_text())
        except (OSError, ValueError):
            return None

    def _start(self, identity: Mapping[str, Any], count: int) -> None:
        (self._folder / _IDENTITY).unlink(missing_ok=True)
        (self._folder / _DETAILS).unlink(missing_ok=True)
        os.ftruncate(self._lock, 0)
        os.ftruncate(self._lock, count * RECORD.itemsize)
        (self._folder / _IDENTITY).write_text(json.dumps(identity))
