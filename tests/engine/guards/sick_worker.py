"""One rank of a run with an ailment: python -m tests.engine.guards.sick_worker AILMENT RECIPE; the last rank has it.

`stalled`: reading data never returns. `raising`: step 7 ends in an error of its own. `flipped`: a weight changes by one bit
at step 6. `sick`: reads slowly for a while and leaks memory, while no rank's teacher follows the student.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from lut_ds.cli import main
from lut_ds.data import sources
from lut_ds.engine.ema import WeightEMA
from lut_ds.engine.step import Trainer

FLIP_AT, RAISE_AT, STALL_AFTER = 6, 7, 50
LEAK = 6 << 20  # bytes a step
SLOW, SLOW_IMAGES = 0.2, 96  # seconds an image, for so many: twelve steps that are nearly all waiting, on any machine
CHOSEN = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
leaked: list[bytearray] = []


def read_through(slowly: Callable[[int], None]) -> None:
    """Let this rank's source call `slowly` with the number of images read before each one."""
    open_source = sources.open_source

    def opened(*args: Any, **kwargs: Any) -> sources.Source:
        source = open_source(*args, **kwargs)
        read, count = source.read, iter(range(10**9))

        def instead(i: int) -> bytes:
            slowly(next(count))
            return read(i)

        source.read = instead  # type: ignore[method-assign]
        return source

    sources.open_source = opened


def after_update(then: Callable[[Trainer, int], None]) -> None:
    """Call `then` with the trainer and the step after each update."""
    update = Trainer.update
    steps = iter(range(1, 10**9))

    def instead(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        metrics = update(self, *args, **kwargs)
        then(self, next(steps))
        return metrics

    Trainer.update = instead  # type: ignore[method-assign]


def stalled_read(count: int) -> None:
    if count > STALL_AFTER:
        time.sleep(3600)


def flip(trainer: Trainer, step: int) -> None:
    if step == FLIP_AT:
        next(trainer.student.parameters()).data.view(-1).view(torch.int32)[0] ^= 1


def fail(trainer: Trainer, step: int) -> None:
    if step == RAISE_AT:
        raise RuntimeError("an error of this rank alone")


def fall_ill(ailment: str) -> None:
    if ailment == "sick":
        WeightEMA.refresh = lambda self: None  # type: ignore[method-assign]
    if ailment == "stalled" and CHOSEN:
        read_through(stalled_read)
    if ailment == "flipped" and CHOSEN:
        after_update(flip)
    if ailment == "raising" and CHOSEN:
        after_update(fail)
    if ailment == "sick" and CHOSEN:
        read_through(lambda count: time.sleep(SLOW if count < SLOW_IMAGES else 0))
        after_update(lambda trainer, step: leaked.append(bytearray(b"x" * LEAK)))


if __name__ == "__main__":
    fall_ill(sys.argv[1])
    sys.exit(main(["pretrain", *sys.argv[2:], "--json"]))
