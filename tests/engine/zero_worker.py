"""One rank of the ZeRO parity test: trains tiny LUTs on given pixels with the real Trainer and writes what it got.

Run with the launcher's environment set: python zero_worker.py CASES.json OUT_FOLDER
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lut_ds.config import parse_recipe
from lut_ds.engine.launch import discover_ranks, process_group
from lut_ds.engine.step import Trainer
from tests.engine.tiny import DECAYS, LEARNING_RATES, pixels


@dataclass
class Batch:
    views: list[Tensor]
    noise: Tensor
    draws: Tensor | None = None


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = discover_ranks()
    torch.set_num_threads(1)
    with process_group(ranks):
        for name, tree in cases.items():
            recipe = parse_recipe(tree, name)
            world, micro = ranks.world_size, recipe.train.micro_batch
            assert micro is not None
            accumulation = recipe.train.global_batch // (micro * world)
            trainer = Trainer(recipe, ranks, micro, accumulation)
            rows = []
            for step, (lr, decay) in enumerate(zip(LEARNING_RATES, DECAYS, strict=True)):
                view1, view2, noise = pixels(recipe, step)
                batches = []
                for m in range(accumulation):
                    first = (m * world + ranks.rank) * micro
                    part = slice(first, first + micro)
                    views = [view1[part], view2[part]][: recipe.method.views]
                    batches.append(Batch(views, noise[part]))
                rows.append(
                    trainer.update(batches, lr, decay)[: len(trainer.metric_names) + 2]
                )  # norm and applied last
            shards = trainer.shards
            whole = {f"master.{k}": v for k, v in shards.assemble(shards.flats, torch.float32).items()}
            if trainer.ema is not None:
                whole |= {f"ema.{k}": v for k, v in shards.assemble(trainer.ema.flats, torch.float32).items()}
                whole |= {f"ema.{k}": v for k, v in trainer.ema.buffers.items()}
                whole |= {f"teacher.{k}": v for k, v in trainer.teacher.state_dict().items()}
            if ranks.main:
                tensors = {"metrics": torch.stack(rows), **whole}
                save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, out / f"{name}.safetensors")
            trainer.engine.destroy()


if __name__ == "__main__":
    main()
