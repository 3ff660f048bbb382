"""A short look at whether the step costs more than it did: ours beside the expert's baseline, step by step in one process."""

import os
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lut_ds.bench.expert import Expert
from lut_ds.bench.machine import describe_machine
from lut_ds.bench.rounds import Figures, summarise
from lut_ds.bench.step import step_recipe
from lut_ds.bench.step_run import normalised, synthetic_batches
from lut_ds.config import Recipe
from lut_ds.engine.launch import discover_ranks, process_group
from lut_ds.engine.step import Trainer

BATCH = 16
# Every part of a ViT-S step in a tenth of its work.
SMALL = ("model.image_size=112", "model.depth=3", "model.decoder_depth=2", "method.head_hidden=1024")
FAR_OUT = 0.6  # of the committed ratio: no noise of a shared machine does this to steps that alternate


def measure_ratios(pairs: int, precisions: Iterable[str] = ("fp32", "bf16")) -> dict[str, Any]:
    """The expert's CPU time a step over ours on a small ViT, one thread, from steps in turn.

    Args:
        pairs: steps of each, after one that does not count.

    Returns:
        `machine`; `ratios`: by precision the median, least and largest; `step_ms`: by precision and side the median.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    ranks = discover_ranks()
    ratios: dict[str, Figures] = {}
    milliseconds: dict[str, Figures] = {}
    with process_group(ranks):
        for precision in precisions:
            words = [f"precision.{key}={precision}" for key in ("compute", "teacher")]
            recipe = step_recipe("lut_vits16", None, [*SMALL, *words], BATCH)
            trainer = Trainer(recipe, ranks, BATCH, 1)
            found = _in_turn(_ours(trainer, recipe), _experts(recipe), pairs)
            trainer.engine.destroy()
            ratios[precision] = summarise([{"ratio": expert / ours} for ours, expert in found])["ratio"]
            milliseconds[precision] = {
                side: 1e3 * median(times)
                for side, times in zip(("ours", "expert"), zip(*found, strict=True), strict=True)
            }
    return {"machine": describe_machine(), "ratios": ratios, "step_ms": milliseconds}


def _ours(trainer: Trainer, recipe: Recipe) -> Callable[[], Tensor]:
    batches = synthetic_batches(recipe, BATCH, trainer.device)
    return lambda: trainer.update([next(batches)], 1e-4, 0.996)


def _experts(recipe: Recipe) -> Callable[[], Tensor]:
    torch.manual_seed(recipe.run.seed)
    expert = Expert(recipe, torch.device("cpu"), False)
    batch = next(synthetic_batches(recipe, BATCH, torch.device("cpu")))
    images = torch.cat(normalised(batch.views))
    return lambda: expert.step(images, batch.noise)


def _in_turn(first: Callable[[], Tensor], second: Callable[[], Tensor], pairs: int) -> list[tuple[float, float]]:
    """Seconds of both, pair by pair, the order changing, so that what else the machine does falls on both alike."""
    found = []
    for number in range(pairs + 1):
        sides = {"first": first, "second": second}
        times = {name: _seconds(sides[name]) for name in (sides if number % 2 else reversed(sides))}
        found.append((times["first"], times["second"]))
    return found[1:]


def _seconds(step: Callable[[], Tensor]) -> float:
    """CPU time, which others on the machine disturb little."""
    began = time.process_time()
    step()
    return time.process_time() - began


def judge(found: dict[str, Any], committed: dict[str, Any]) -> tuple[list[str], bool]:
    """A line a precision, and whether one is so far below the committed ratio that noise does not explain it."""
    lines, bad = [], False
    for precision, ratio in found["ratios"].items():
        before = committed["ratios"][precision]["median"]
        share = ratio["median"] / before
        bad |= share < FAR_OUT
        word = "FAR OUT" if share < FAR_OUT else "slower" if share < 0.85 else "ok"
        lines.append(
            f"step {precision}: a plain step costs {ratio['median']:.2f} times the CPU time of ours "
            f"({ratio['min']:.2f}-{ratio['max']:.2f}), committed {before:.2f}: {word}"
        )
    return lines, bad
