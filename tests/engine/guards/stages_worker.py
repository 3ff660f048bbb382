"""One rank of the guard test in every ZeRO stage: a NaN in one rank's pixels, a loss spike, a flipped bit; says what moved.

Run with the launcher's environment set: python stages_worker.py CASES.json OUT.json
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from lut_ds.config import parse_recipe
from lut_ds.engine.guards.divergence import ReplicaCheck
from lut_ds.engine.launch import discover_ranks, process_group
from lut_ds.engine.step import Trainer
from lut_ds.errors import RunFault
from tests.engine.tiny import pixels
from tests.engine.zero_worker import Batch

BAD_STEP, SPIKE_STEP = 2, 3


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that a bad step must leave alone."""
    shards, ema = trainer.shards, trainer.ema
    assert ema is not None
    assert trainer.teacher is not None
    moments = [shards.moments(i) for i in range(len(shards.flats))]
    parts = {
        "masters": shards.flats,
        "moments": [m[k].reshape(-1) for m in moments for k in ("exp_avg", "exp_avg_sq", "step")],
        "ema": ema.flats,
        "ema buffers": [b.reshape(-1).float() for b in ema.buffers.values()],
        "batch norm": [b.reshape(-1).float() for n, b in trainer.student.named_buffers() if "pos_embed" not in n],
        "teacher": [p.reshape(-1).float() for p in trainer.teacher.parameters()],
    }
    return {name: torch.cat([t.detach().clone().view(-1) for t in tensors]) for name, tensors in parts.items()}


def replicas(trainer: Trainer) -> str | None:
    """What a comparison of the ranks finds."""
    check = ReplicaCheck(trainer)
    check.start(5)
    try:
        check.finish()
    except RunFault as fault:
        return str(fault)
    return None


def flip(tensor: Tensor) -> None:
    """Change the lowest bit of one value."""
    bits = tensor.data.view(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    bits[len(bits) // 2] ^= 1


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = discover_ranks()
    torch.set_num_threads(1)
    results = {}
    with process_group(ranks):
        for name, tree in cases.items():
            recipe = parse_recipe(tree, name)
            trainer = Trainer(recipe, ranks, recipe.train.global_batch // ranks.world_size, 1)
            steps = []
            for step in range(5):
                view1, view2, noise = pixels(recipe, step)
                part = slice(
                    ranks.rank * len(noise) // ranks.world_size, (ranks.rank + 1) * len(noise) // ranks.world_size
                )
                views = [v[part].permute(0, 3, 1, 2).float() / 128 - 1 for v in (view1, view2)]
                if step == BAD_STEP and ranks.rank == ranks.world_size - 1:
                    views[0][0, 0, :, :] = float("nan")
                assert trainer.window is not None
                trainer.window.load([1e-6 if step == SPIKE_STEP else 1e6] * 8)
                before = snapshot(trainer)
                metrics = trainer.update([Batch(views, noise[part])], 1e-3, 0.9)
                after = snapshot(trainer)
                steps.append(
                    {
                        "applied": metrics[len(trainer.metric_names) + 1].item(),
                        "moved": [k for k in before if not torch.equal(before[k], after[k])],
                        "finite": all(torch.isfinite(v).all().item() for v in after.values()),
                    }
                )
            healthy = replicas(trainer)
            if ranks.rank == ranks.world_size - 1:
                assert trainer.teacher is not None
                flip(next((trainer.teacher if trainer.stage == 3 else trainer.student).encoder.blocks.parameters()))
            results[name] = {"steps": steps, "healthy": healthy, "flipped": replicas(trainer)}
            trainer.engine.destroy()
    Path(f"{out}.{ranks.rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
