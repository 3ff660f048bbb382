"""Stragglers, growing memory, a teacher that stands still: found when they are there, and only then."""

import numpy as np
import pytest
import torch

from lut_ds.engine.guards.movement import TeacherMovement
from lut_ds.engine.guards.vitals import GrowthWatch, LocalClock, Straggler, StragglerWatch, Vitals

MIB = float(2**20)


def healthy(rng: np.random.Generator, ranks: int = 8) -> list[Vitals]:
    return [Vitals(0.2 * rng.uniform(0.95, 1.05), 0.01 * rng.uniform(0, 3), 1e9) for _ in range(ranks)]


def test_a_slow_rank_is_named_once_after_three_flushes_and_again_after_it_recovered() -> None:
    rng, watch = np.random.default_rng(0), StragglerWatch(1.5)
    named = []
    for flush in range(30):
        vitals = healthy(rng)
        if flush in (2, 3) or 10 <= flush < 20 or flush >= 25:
            vitals[5] = vitals[5]._replace(compute=0.4)
        named += [(flush, slow.rank, slow.cause) for slow in watch.feed(vitals, 1.0)]
    assert named == [(12, 5, "computing"), (27, 5, "computing")]


def test_a_rank_that_waits_for_data_is_told_apart() -> None:
    watch, rng = StragglerWatch(1.5), np.random.default_rng(0)
    found: list[Straggler] = []
    for _ in range(3):
        vitals = healthy(rng, ranks=2)
        vitals[1] = vitals[1]._replace(data=0.9)
        found += watch.feed(vitals, 1.0)
    assert [(s.rank, s.cause, s.seconds) for s in found] == [(1, "waiting for data", 0.9)]


def test_times_too_short_to_matter_name_nobody() -> None:
    watch = StragglerWatch(1.5)
    for _ in range(5):
        assert watch.feed([Vitals(1e-4, 0, 0), Vitals(1e-4, 0, 0), Vitals(9e-4, 0, 0)], 1.0) == []


@pytest.mark.parametrize("leak", [0.0, 10.0])
def test_memory_that_grows_steadily_is_said_and_noise_is_not(leak: float) -> None:
    rng, watch = np.random.default_rng(1), GrowthWatch(0.2)
    found = []
    for flush in range(200):
        start_up = 300 * min(flush, 4)  # the first flushes fill caches
        memory = (1000 + start_up + leak * flush + 40 * rng.random()) * MIB
        found.append(watch.feed(flush * 10, memory))
    said = [entry for entry in found if entry is not None]
    if not leak:
        assert said == []
    else:
        steps, before, now = said[0]
        assert now > 1.2 * before
        assert (now - before) / steps == pytest.approx(leak * MIB / 10, rel=0.5)
        assert len(said) <= 6


def test_the_local_clock_adds_up_and_starts_again() -> None:
    clock = LocalClock(torch.device("cpu"))
    for _ in range(2):
        with clock:
            sum(range(10000))
    assert clock.take() > 0
    assert clock.take() == 0


def records(steps: int, **values: float) -> list[dict[str, float]]:
    return [{"applied": 1.0, "lr": 1e-4, "ema_decay": 0.99, **values}] * steps


def test_a_teacher_that_stands_still_is_said_once() -> None:
    movement = TeacherMovement()
    assert movement.stuck(7) is None
    movement.count(records(60))
    assert movement.stuck(7) is None
    movement.count(records(60))
    assert movement.stuck(7) == 120
    movement.count(records(60))
    assert movement.stuck(7) is None
    assert movement.stuck(8) is None


@pytest.mark.parametrize("values", [{"applied": 0.0}, {"lr": 0.0}, {"ema_decay": 1.0}])
def test_steps_that_cannot_move_the_teacher_do_not_count(values: dict[str, float]) -> None:
    movement = TeacherMovement()
    movement.stuck(7)
    movement.count(records(1000, **values))
    assert movement.stuck(7) is None


def test_memory_that_rises_once_and_stays_is_not_growth() -> None:
    watch = GrowthWatch(0.2)
    assert not any(watch.feed(flush, 1500 * MIB if flush > 50 else 1000 * MIB) for flush in range(200))
