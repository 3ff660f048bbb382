"""Workers that crash, hang or raise: the item is named, the others are answered, and no process is left behind."""

import ctypes
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from lut_ds.data.workers import Crash, Crew, Work
from lut_ds.errors import RunFault, UserError


def doubling(bad: dict[int, str], log: Path | None = None) -> Work[list[int]]:
    """Doubles its items, and does what `bad` says when it comes to one of these."""

    def work(items: NDArray[np.int64]) -> list[int]:
        for item in items.tolist():
            if log is not None:
                with log.open("a") as file:
                    file.write(f"{item} {os.getpid()}\n")
            act(bad.get(item, ""))
        return (2 * items).tolist()

    return work


def act(how: str) -> None:
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "exit":
        os._exit(7)
    elif how == "hang":
        time.sleep(3600)
    elif how == "user":
        raise UserError("expected better input")
    elif how == "bug":
        raise KeyError("no such key")


def chunks(count: int, size: int) -> list[NDArray[np.int64]]:
    return [np.arange(i, min(i + size, count)) for i in range(0, count, size)]


def answers(crew: Crew[list[int]], count: int, size: int) -> dict[int, int | str]:
    found: dict[int, int | str] = {}
    for chunk, answer in crew.run(chunks(count, size)):
        values = [answer.why] if isinstance(answer, Crash) else answer
        assert len(values) == len(chunk)
        found |= dict(zip(chunk.tolist(), values))
    return found


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("workers", [1, 3])
def test_items_that_crash_are_named_and_all_others_answered(workers: int) -> None:
    crew = Crew[list[int]](partial(doubling, {5: "segfault", 6: "exit", 31: "segfault"}), workers)
    crashed: dict[int, int | str] = {5: "killed by SIGSEGV", 6: "exit code 7", 31: "killed by SIGSEGV"}
    assert answers(crew, 40, 8) == {i: 2 * i for i in range(40)} | crashed


def test_an_item_that_hangs_is_given_up() -> None:
    crew = Crew[list[int]](partial(doubling, {2: "hang"}), 2, patience=4)
    assert answers(crew, 6, 3) == {i: 2 * i for i in range(6)} | {2: "no answer in 4 s"}


def test_exceptions_reach_the_caller() -> None:
    with pytest.raises(UserError, match="expected better input"):
        answers(Crew(partial(doubling, {3: "user"}), 2), 8, 2)
    with pytest.raises(RunFault, match=r"(?s)a worker process failed:.*KeyError: 'no such key'"):
        answers(Crew(partial(doubling, {3: "bug"}), 2), 8, 2)


def broken_opener() -> Work[list[int]]:
    os._exit(3)


def test_workers_that_cannot_start_end_it() -> None:
    with pytest.raises(RunFault, match="could not start: exit code 3"):
        answers(Crew(broken_opener, 2), 8, 2)


def test_nothing_is_left_after_a_stop(tmp_path: Path) -> None:
    answers(Crew(partial(doubling, {}), 1), 1, 1)  # the server that forks, and its tracker, stay
    before = children()
    running = Crew[list[int]](partial(doubling, {9: "hang"}, tmp_path / "log"), 2).run(chunks(40, 1))
    seen = [next(running) for _ in range(5)]
    assert len(seen) == 5
    assert children() - before
    running.close()
    deadline = time.monotonic() + 600
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not children() - before


def test_it_stops_when_asked() -> None:
    found: list[object] = []
    for answer in Crew[list[int]](partial(doubling, {}), 1).run(chunks(40, 1), lambda: len(found) >= 3):
        found.append(answer)
    assert len(found) == 3
