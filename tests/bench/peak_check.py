"""The plan's peak beside the most that torch allocates in real training steps on a CPU.

Run: python -m tests.bench.peak_check [RECIPE BATCH WORD ...]       a line of JSON; a minute a case
"""

import json
import os
import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from lut_ds.bench.step_run import synthetic_batches
from lut_ds.config import load_recipe
from lut_ds.engine.ds_config import load_ds_config
from lut_ds.engine.launch import discover_ranks, process_group
from lut_ds.engine.memory import memory
from lut_ds.engine.step import Trainer

SETS = 4  # that synthetic_batches keeps
FP32 = ("precision.compute=fp32", "precision.teacher=fp32")


def peak(name: str, batch: int, words: Sequence[str]) -> dict[str, float]:
    """Planned and measured bytes of a lone rank: from the model's making to the end of its second step."""
    sizes = [f"train.global_batch={batch}", f"train.micro_batch={batch}", f"data.prefetch={SETS - 1}"]
    ranks, recipe = discover_ranks(), load_recipe(name, [*sizes, *words])
    activities = [torch.profiler.ProfilerActivity.CPU]
    with process_group(ranks), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        trainer, batches = Trainer(recipe, ranks, batch, 1), synthetic_batches(recipe, batch, ranks.device)
        for _ in range(2):
            trainer.update([next(batches)], 1e-4, 0.9)
    recorded: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    measured = max(accumulate(size for _, size in changes))
    planned = memory(recipe, load_ds_config(recipe), 1, batch, 1, "cpu").peak
    return {"planned": planned, "measured": measured, "ratio": planned / measured}


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    name, batch, *words = sys.argv[1:] or ("lut_vits16", "16", *FP32, "train.deepspeed=zero1")
    print(json.dumps({" ".join([name, f"batch {batch}", *words]): peak(name, int(batch), words)}))


if __name__ == "__main__":
    main()
