"""Reading from storage that may be away for a while: an unmounted data set is waited for, a missing file is not."""

import errno
import sys
import threading
import time
from collections.abc import Callable

from lut_ds.data.sources import Source
from lut_ds.errors import RunFault

# What a network file system says while its server restarts, or a node that is short of something: not about the file.
TRANSIENT = frozenset(
    {
        *(errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESHUTDOWN),
        *(errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
        *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EAGAIN, errno.EBUSY, errno.EINTR),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOLCK),
    }
)
_FILE_SECONDS = 5.0  # how long a file is tried again that fails so while others can be read: a bad block stays bad
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 15.0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class PatientReader:
    """Reads samples of a source from many threads, outlasting `retry_seconds` in which nothing of it can be read.

    Args:
        source: where from.
        retry_seconds: how long to wait for storage that is away, seconds.
        setting: what a user sets to wait longer, where that can be set.
        suspect: whether storage of which nothing has been read yet may be away; else a sample that fails then is bad.
        say: takes a line for people.
    """

    def __init__(
        self,
        source: Source,
        retry_seconds: float,
        *,
        setting: str | None = None,
        suspect: bool = True,
        say: Callable[[str], None] = _say,
    ) -> None:
        self._source, self._retry_seconds = source, retry_seconds
        self._setting, self._suspect, self._say = setting, suspect, say
        self._last_good: int | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._away_since: float | None = None

    def read(self, i: int) -> bytes | RunFault:
        """The encoded sample `i`, or the fault that is this sample's own.

        Raises:
            RunFault: nothing of the source could be read for `retry_seconds`.
        """
        started, delay, confirmed = time.monotonic(), _FIRST_DELAY, False
        while True:
            try:
                data = self._source.read(i)
            except RunFault as fault:
                away = not self._others_read(i)
                waited = time.monotonic() - started
                if away:
                    self._wait_for_storage(fault, waited)
                    confirmed = False
                elif not confirmed:
                    # The storage may have come back between the two: only another failure is the file's own.
                    confirmed = True
                    continue
                elif waited >= min(_FILE_SECONDS, self._retry_seconds) or not _is_transient(fault):
                    return fault
            else:
                self._last_good = i
                self._is_back()
                return data
            if self._closed.wait(delay):
                raise RunFault("data: reading was stopped")
            delay = min(2 * delay, _LONGEST_DELAY)

    def close(self) -> None:
        """End all waiting."""
        self._closed.set()

    def _others_read(self, i: int) -> bool:
        """Whether the source is there: one of a few other samples can be read."""
        n, good = len(self._source), self._last_good
        if good is None and not self._suspect:
            return True
        for other in dict.fromkeys([i if good is None else good, 0, n // 3, n // 2, n - 1]):
            if other == i:
                continue
            try:
                self._source.read(other)
            except RunFault:
                continue
            return True
        return n == 1  # nothing to compare with: take the sample's word

    def _wait_for_storage(self, fault: RunFault, waited: float) -> None:
        """Say once that the storage is away; RunFault when that lasted too long."""
        if waited >= self._retry_seconds:
            longer = f" ({self._setting} waits longer)" if self._setting else ""
            raise RunFault(
                f"{fault}; nor could any other file, for {waited:.0f} s: see that the data is mounted, then run again{longer}"
            ) from fault
        with self._lock:
            if self._away_since is None:
                self._away_since = time.monotonic()
                self._say(
                    f"{fault}; nor can other files: waiting up to {self._retry_seconds:g} s for the storage to come back"
                )

    def _is_back(self) -> None:
        if self._away_since is None:
            return
        with self._lock:
            if self._away_since is not None:
                self._say(f"data: can be read again, after {time.monotonic() - self._away_since:.0f} s")
                self._away_since = None


def _is_transient(fault: RunFault) -> bool:
    return isinstance(fault.__cause__, OSError) and fault.__cause__.errno in TRANSIENT
