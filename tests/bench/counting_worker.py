"""One rank that counts: bytes of every collective of real training steps by kind, and of the states that it holds.

Run with the launcher's environment set: python -m tests.bench.counting_worker CASES.json OUT.json
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lut_ds.config import parse_recipe
from lut_ds.engine.launch import discover_ranks, process_group
from lut_ds.engine.step import Trainer
from tests.engine.tiny import pixels
from tests.engine.zero_worker import Batch

STEPS = {0: 1, 1: 1, 2: 1, 3: 3}  # by stage: ZeRO-3 records its order in the first two
OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_": "reduce",
}


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Of their storages, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


class Counter(TorchDispatchMode):
    """Bytes of the whole tensors of every operation that reaches torch's process group, by kind and operation."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)
        self._hidden = hidden
        self._inside: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d":
            operation = OPERATIONS[name]
            # A gather's first argument is its output; a reduce-scatter's second is its input.
            tensors = torch.utils._pytree.tree_leaves(args[1 if operation == "reduce_scatter" else 0])
            moved = [t for t in tensors if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in moved)
            self.bytes[f"{self._kind(operation, moved)}: {operation}"] += size
        return func(*args, **(kwargs or {}))

    def _kind(self, operation: str, moved: list[Tensor]) -> str:
        if self._inside and self._inside[-1] != "step":
            return self._inside[-1]
        elements = sum(t.numel() for t in moved)
        if operation == "all_reduce" and elements in (1, self._hidden):
            return "guards" if elements == 1 else "batch norm"
        if operation == "all_gather":
            return "step weights" if self._inside else "weights"
        return "gradients"

    def watch(self, owner: Any, name: str, kind: str) -> None:
        """Count what happens inside a method as `kind`."""
        inner: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(kind)
            try:
                return inner(*args, **kwargs)
            finally:
                self._inside.pop()

        setattr(owner, name, watched)


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes of this rank's states after a step."""
    shards, optimizer = trainer.shards, trainer.engine.optimizer
    parameters = list(trainer.student.parameters())
    partitions = [p.ds_tensor for p in parameters] if trainer.stage == 3 else []
    flat = optimizer.bit16_groups_flat if trainer.stage in (1, 2) else []
    moments = [shards.moments(i)[k] for i in range(len(shards.flats)) for k in ("exp_avg", "exp_avg_sq")]
    return {
        "weights": bytes_of([*(p.data for p in parameters if p.numel()), *partitions, *flat]),
        "masters": bytes_of(shards.flats) if trainer.stage > 0 else 0,
        "moments": bytes_of(moments),
        "ema": bytes_of(trainer.ema.flats) if trainer.ema is not None else 0,
        "teacher": bytes_of(trainer.teacher.parameters()) if trainer.teacher is not None else 0,
    }


def gradients(trainer: Trainer) -> int:
    """Bytes of the gradients that are accumulated between micro-batches."""
    optimizer = trainer.engine.optimizer
    found: list[Tensor | None] = [p.grad for p in trainer.student.parameters()]
    if trainer.stage in (1, 2):
        found += [getattr(p, "grad_accum", None) for p in trainer.student.parameters()]
        found += [
            g
            for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors)
            for v in kept.values()
            if v
            for g in v
        ]
        found.append(optimizer.grads_in_partition)
    if trainer.stage == 3:
        found.append(optimizer.grad_partitions_flat_buffer)
    return bytes_of(found)


def count(tree: dict[str, Any], name: str, ranks: Any) -> dict[str, Any]:
    """Train a few steps; what the last one sent, and what the rank holds."""
    recipe = parse_recipe(tree, name)
    world, micro = ranks.world_size, recipe.train.micro_batch
    assert micro is not None
    trainer = Trainer(recipe, ranks, micro, recipe.train.global_batch // (micro * world))
    accumulated: list[int] = []
    step = trainer.engine.step
    trainer.engine.step = lambda: (accumulated.append(gradients(trainer)), step())
    steps = STEPS[trainer.stage]
    for index in range(steps):
        view1, view2, noise = pixels(recipe, index)
        parts = [
            slice((m * world + ranks.rank) * micro, (m * world + ranks.rank + 1) * micro)
            for m in range(trainer.accumulation)
        ]
        batches = [Batch([view1[p], view2[p]][: recipe.method.views], noise[p]) for p in parts]
        if index < steps - 1:
            trainer.update(batches, 1e-3, 0.9)
        else:
            counter = Counter(recipe.method.head_hidden)
            counter.watch(trainer, "_share", "guards")
            counter.watch(trainer.engine, "step", "step")
            if trainer.ema is not None:
                counter.watch(trainer.ema, "refresh", "teacher refresh")
            with counter:
                trainer.update(batches, 1e-3, 0.9)
    found = {"sent": dict(counter.bytes), "held": {**held(trainer), "gradients": accumulated[-2]}}
    trainer.engine.destroy()
    return found


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = discover_ranks()
    torch.set_num_threads(1)
    with process_group(ranks):
        results = {name: count(tree, name, ranks) for name, tree in cases.items()}
    Path(f"{out}.{ranks.rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
