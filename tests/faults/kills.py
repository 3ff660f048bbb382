"""Ranks that are killed (SIGKILL) at random instants, again and again."""

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lut_ds.engine.manifest import step_folders
from tests.faults.victim import SAVE_EVERY, Start, Victim, undisturbed, until

INSTANTS = ("any time", "after a step", "in a save")
SHARES = (0.2, 0.35, 0.45)
LAUNCHER_SECONDS = 30.0  # until a launcher would end the ranks that stay behind


class Killer:
    """Kills a run's ranks until it was continued so many times.

    Args:
        victim: the run.
        seed: of the instants and of who is hit.
    """

    def __init__(self, victim: Victim, seed: int) -> None:
        self._victim, self._random = victim, random.Random(seed)
        self._start_seconds = 5.0
        self.instants: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.survivors: Counter[str] = Counter()
        self.torn_saves = 0

    def attack(self) -> None:
        """One start and its end."""
        old = self._victim.partials()
        start, begun = self._victim.start(), time.monotonic()
        try:
            instant = self._random.choices(INSTANTS, SHARES)[0]
            self._wait(instant, start, begun)
            hit = self._random.choice([[rank] for rank in range(self._victim.ranks)] + [[*range(self._victim.ranks)]])
            for rank in hit:
                start.processes[rank].kill()
            self.instants[instant] += 1
            self.hits["all ranks" if len(hit) == self._victim.ranks else f"rank {hit[0]}"] += 1
            for rank in set(range(self._victim.ranks)) - set(hit):
                self.survivors[self._outlive(start, rank, 1.0 if instant == "any time" else LAUNCHER_SECONDS)] += 1
        finally:
            start.kill()
        self.torn_saves += bool(self._victim.partials() - old)
        assert self._victim.damaged() == []

    def _wait(self, instant: str, start: Start, begun: float) -> None:
        """Sleep until the instant has come; a rank that ends before by itself is a defect."""
        old, draw = self._victim.partials(), self._random.random()
        if instant == "any time":
            time.sleep(draw * 1.3 * self._start_seconds)
        elif not step_folders(self._victim.checkpoints):
            self._victim.reach(start, SAVE_EVERY)  # there is nothing to continue yet
        else:
            until(lambda: not start.alive() or "continuing" in start.said(), "a start")
            self._start_seconds = time.monotonic() - begun
            if instant == "in a save":
                until(lambda: not start.alive() or self._victim.partials() - old, "a save", 0.0005)
                time.sleep(draw * 0.015)
            else:
                time.sleep(draw * 0.6)
        assert start.alive(), f"a rank ended by itself: {start.said()[-3000:]}"

    def _outlive(self, start: Start, rank: int, seconds: float) -> str:
        """How a rank took the loss of another."""
        try:
            code = start.processes[rank].wait(seconds)
        except subprocess.TimeoutExpired:
            return "waited, ended by the launcher"
        lines = start.lines(rank)
        return (
            f"exit {code}, one line" if len(lines) == 1 and lines[0].startswith("lut-ds") else f"exit {code}: {lines}"
        )


def kill_often(folder: Path, data: Path, ranks: int, resumes: int, seed: int) -> dict[str, Any]:
    """Kill a run until it was continued `resumes` times, let it end, and compare it with an undisturbed one."""
    victim = Victim(folder / "killed", data, ranks)
    killer, kills, begun = Killer(victim, seed), 0, time.monotonic()
    while len(victim.events("resumed")) < resumes - 1 or not kills:
        killer.attack()
        kills += 1
        done, seconds = len(victim.events("resumed")), time.monotonic() - begun
        left = f", {seconds / done * (resumes - done):.0f} s left" if done else ""
        print(
            f"{kills} kills, {done} of {resumes} resumes, step {victim.last_step()}{left}", file=sys.stderr, flush=True
        )
    steps = victim.last_step() + 2 * SAVE_EVERY
    victim.go(steps)
    assert len(victim.events("resumed")) >= resumes
    assert victim.damaged() == []
    deviation = victim.deviation(undisturbed(folder / "undisturbed", data, ranks, steps))
    assert deviation is None, deviation
    assert victim.leftovers() == []
    return {
        "ranks": ranks,
        "kills": kills,
        "resumes": len(victim.events("resumed")),
        "instants": dict(killer.instants),
        "hit": dict(killer.hits),
        "kills_that_left_an_unfinished_save": killer.torn_saves,
        "surviving_ranks": dict(killer.survivors),
        "damaged_checkpoints": 0,
        "steps": steps,
        "seed": seed,
    }
