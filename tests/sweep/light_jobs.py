"""Jobs of the pool that import nothing heavy. Which GPU one sees is read where DeepSpeed reads it: while it is imported."""

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

SEEN = os.environ.get("CUDA_VISIBLE_DEVICES")
TOLD = 9


def note(partners: int, log: Path, environment: Mapping[str, str]) -> None:
    """Write what this process sees, once so many jobs have begun."""
    blocked = [number.name for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    log.with_suffix(".began").touch()
    while len(list(log.parent.glob("*.began"))) < partners:
        time.sleep(0.02)
    log.write_text(json.dumps({"imported": SEEN, "given": environment["CUDA_VISIBLE_DEVICES"], "blocked": blocked}))


def linger(log: Path, environment: Mapping[str, str]) -> None:
    """Say who it is, and wait to be told to stop."""
    signal.signal(signal.SIGUSR2, lambda number, frame: os._exit(TOLD))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    aside = log.with_suffix(".partial")
    aside.write_text(str(os.getpid()))
    aside.rename(log)
    time.sleep(3600)


def end_after(other: Path, log: Path, environment: Mapping[str, str]) -> None:
    """End once another job has begun."""
    while not other.exists():
        time.sleep(0.02)
