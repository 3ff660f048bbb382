"""Asking a run to stop: a signal sets a flag, the ranks agree on a step, save, and leave with exit code 3."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")


class StopRequest:
    """Whether this rank was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def requested(self) -> bool:
        """True once a signal came."""
        return self.signal_name is not None


def listened(names: Sequence[str]) -> signal.Signals:
    """What asks a process that listens to these to stop: SIGTERM, which it may just end of if it listens to none, or the first."""
    return signal.Signals["SIGTERM" if "SIGTERM" in names or not names else names[0]]


@contextmanager
def listen(names: Sequence[str] = STOP_SIGNALS) -> Iterator[StopRequest]:
    """Turn these signals (`SIGTERM`, ...) into a request while inside; a second SIGINT interrupts at once."""
    request = StopRequest()

    def handler(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and request.requested:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name

    previous = {number: signal.signal(number, handler) for number in map(signal.Signals.__getitem__, names)}
    try:
        yield request
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
