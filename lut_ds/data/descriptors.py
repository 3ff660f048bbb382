"""File descriptors that stay open between reads: few at a time, used by many threads."""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MOST = 1024


class _Open:
    def __init__(self, fd: int) -> None:
        self.fd, self.users, self.dropped = fd, 0, False


class Descriptors:
    """Descriptors by number, opened by `open_one(k)` when they are needed; the least recently used are closed above `limit`.

    A descriptor is never closed while a thread reads from it. `limit` None: a quarter of what the process may open, at
    most 1,024.
    """

    def __init__(self, open_one: Callable[[int], int], limit: int | None = None) -> None:
        self._open_one = open_one
        self._limit = limit or max(4, min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._held: OrderedDict[int, _Open] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    @contextmanager
    def use(self, k: int) -> Iterator[int]:
        """The descriptor of `k`, open until the block ends."""
        held = self._take(k)
        try:
            yield held.fd
        finally:
            with self._lock:
                held.users -= 1
                self._close_if_idle(held)

    def forget(self, k: int) -> None:
        """Close the descriptor of `k` once nobody uses it; the next use opens it anew."""
        with self._lock:
            held = self._held.pop(k, None)
            if held is not None:
                held.dropped = True
                self._close_if_idle(held)

    def close(self) -> None:
        """Close all that are not in use now, and the others when they no longer are."""
        with self._lock:
            while self._held:
                self._drop()

    def _take(self, k: int) -> _Open:
        with self._lock:
            held = self._held.get(k)
            if held is not None:
                held.users += 1
                self._held.move_to_end(k)
                return held
        fd = self._open_one(k)  # outside the lock: it may take long on shared storage
        with self._lock:
            held = self._held.setdefault(k, _Open(fd))
            if held.fd != fd:  # another thread was faster
                os.close(fd)
            held.users += 1
            self._held.move_to_end(k)
            while len(self._held) > self._limit:
                self._drop()
            return held

    def _drop(self) -> None:
        _, held = self._held.popitem(last=False)
        held.dropped = True
        self._close_if_idle(held)

    @staticmethod
    def _close_if_idle(held: _Open) -> None:
        if held.dropped and not held.users:
            os.close(held.fd)
