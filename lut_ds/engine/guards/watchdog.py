"""A thread in every rank that ends a run which hangs: stacks of all ranks, who is missing, exit code 1."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

import psutil

from lut_ds.engine.guards.heartbeat import FOLDER, Beat, Heartbeat, Place, describe
from lut_ds.tracking import EventLog

STACKS = "stacks"
STARTING, SAVING = "starting", "saving"
PATIENCE = {STARTING: 3, SAVING: 3}  # times the usual limit: the first step compiles, a save writes many gigabytes
BEATS = 40  # within the limit, at most 15 s apart
GRACE = 5  # beats between two readings of the others' files: more than a shared file system hides from its readers


class Watchdog:
    """Ends this process when its loop has not moved for too long.

    Time is counted in ticks of a thread of its own on the monotonic clock, each at most twice its length: a clock that is
    set, or a process that was suspended together with the thread, does not look like a hang. A rank whose interpreter is
    blocked altogether cannot count; its stack is dumped by a timer in C, and the others, who wait for it, end the run.

    Args:
        folder: the run folder.
        rank, world_size: of this process.
        launch: see `Heartbeat`.
        seconds: without a completed step until the run counts as hanging; 3 times that before the first step and in a save.
        step: optimizer steps done.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, launch: str, seconds: float, step: int) -> None:
        self._folder, self._rank, self._world, self._limit = folder, rank, world_size, seconds
        self._beat = min(15.0, seconds / BEATS)
        self._place = Place(step + 1, STARTING)
        self._started = False
        self._heart = Heartbeat(folder, rank, launch)
        (folder / STACKS).mkdir(exist_ok=True)
        self._stacks = (folder / STACKS / f"rank_{rank:05d}.txt").open("w")
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"lut-ds-{name}")
            for name, work in (("watchdog", self._count), ("heartbeat", self._show_life))
        ]
        for thread in self._threads:
            thread.start()

    def at(self, phase: str) -> None:
        """The loop is now doing `phase` of the step it is in."""
        self._place = Place(self._place.step, phase if self._started else STARTING)

    def done(self, step: int) -> None:
        """The loop has completed `step` (1-based); a rewind may lower it."""
        self._started = True
        self._place = Place(step + 1, "between steps")

    def close(self) -> None:
        """Stop watching; the run has ended in good order or is being ended by an error."""
        self._closed.set()
        for thread in self._threads:
            thread.join(5 * self._beat)
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        if os.stat(self._stacks.name).st_size == 0:
            os.unlink(self._stacks.name)
        self._heart.remove()
        for folder in (STACKS, FOLDER):
            with contextlib.suppress(OSError):  # something is in there
                (self._folder / folder).rmdir()

    def _show_life(self) -> None:
        """Write the heartbeat; apart from `_count`, because a file system that hangs blocks it."""
        while True:
            with contextlib.suppress(OSError):  # full or away: the run's own writes say so
                self._heart.write(self._place)
            if self._closed.wait(self._beat):
                return

    def _count(self) -> None:
        """Wait for steps that do not come."""
        seen, waited, last = self._place, 0.0, time.monotonic()
        while True:
            faulthandler.dump_traceback_later(self._limit + GRACE * self._beat, file=self._stacks)
            if self._closed.wait(self._beat):
                return
            now = time.monotonic()
            waited, last = waited + min(now - last, 2 * self._beat), now
            place = self._place
            if (place.step, place.phase in PATIENCE) != (seen.step, seen.phase in PATIENCE):
                waited = 0.0
            seen = place
            if waited > self._limit * PATIENCE.get(place.phase, 1):
                self._end(waited)

    def _end(self, waited: float) -> None:
        """Report, for a bounded time, and end the process without asking the thread that hangs."""
        faulthandler.cancel_dump_traceback_later()
        report = threading.Thread(target=self._report, args=(waited,), daemon=True)
        report.start()
        report.join(3 * GRACE * self._beat + 10)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        os._exit(1)

    def _report(self, waited: float) -> None:
        faulthandler.dump_traceback(self._stacks)
        before = self._read_all()
        time.sleep(GRACE * self._beat)
        if any(self._read(rank) != before[rank] for rank in range(self._rank)):
            time.sleep(GRACE * self._beat)  # a lower rank lives and speaks for all; it needs the connection to this one
            return
        missing, text = describe(before, self._read_all())
        stacks = self._folder / STACKS
        line = f"no step for {waited:.0f} s: {text}; stacks of the ranks are in {stacks}; run again to continue"
        print(f"lut-ds: hang: {line}", file=sys.stderr, flush=True)
        log = EventLog(self._folder / "events.jsonl")
        log.write("hang", step=self._place.step, text=line, missing=missing, seconds=waited)
        log.close()

    def _read_all(self) -> dict[int, Beat | None]:
        return {rank: self._read(rank) for rank in range(self._world)}

    def _read(self, rank: int) -> Beat | None:
        return self._heart.read(rank)
