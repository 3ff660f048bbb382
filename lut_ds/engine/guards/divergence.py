"""Whether ranks still hold the same model: checksums of everything that must be equal on all of them."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lut_ds.engine.guards.heartbeat import ranks_in_words
from lut_ds.errors import RunFault

if TYPE_CHECKING:
    from lut_ds.engine.step import Trainer

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MIX = 0x1E3779B97F4A7C15  # odd: multiples of it by different numbers differ modulo 2**64


def checksum(tensor: Tensor) -> Tensor:
    """int64, 0-dim: the sum of a tensor's values read as integers, modulo 2**64. No order of summation changes it."""
    return tensor.detach().view(BITS[tensor.element_size()]).sum(dtype=torch.int64)


def combined(sums: Tensor) -> Tensor:
    """int64, 0-dim: one checksum of many (int64 [n]), which also changes when two of them are exchanged."""
    places = 2 * torch.arange(len(sums), device=sums.device) + 1  # odd, and right for none
    return (sums * (places * MIX)).sum()


def replicated(trainer: "Trainer") -> dict[str, Tensor]:
    """Tensors that are equal on all ranks of a healthy run, by name.

    Weights of student and teacher, batch-norm statistics and their averages, and AdamW's step counts; with ZeRO 0 its
    moments and the teacher's fp32 averages too. What ZeRO gives to one rank alone cannot diverge; of ZeRO 3 that is
    everything but the teacher, the buffers and the step counts.
    """
    shards, ema = trainer.shards, trainer.ema
    found = {f"student.{name}": buffer for name, buffer in trainer.student.named_buffers()}
    if trainer.stage < 3:
        found |= {f"student.{name}": parameter for name, parameter in trainer.student.named_parameters()}
    if trainer.teacher is not None:
        found |= {f"teacher.{name}": parameter for name, parameter in trainer.teacher.named_parameters()}
    if ema is not None:
        found |= {f"ema.{name}": buffer for name, buffer in ema.buffers.items()}
    for index in range(len(shards.flats)):
        moments = shards.moments(index)
        kept = moments if not shards.sharded else {"step": moments["step"]}
        found |= {f"optimizer.{name}.{index}": tensor for name, tensor in kept.items()}
        if ema is not None and not shards.sharded:
            found[f"ema.{index}"] = ema.flats[index]
    return found


class ReplicaCheck:
    """Compares the ranks' checksums: `start` queues it on the device after a step, `finish` reads it at the next flush."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer, self._world = trainer, dist.get_world_size()
        self._started: list[tuple[int, list[str], Tensor, Tensor]] = []

    def start(self, step: int) -> None:
        """Queue the comparison of the state after `step`; a collective that the host does not wait for."""
        tensors = replicated(self._trainer)
        sums = torch.stack([checksum(tensor).to(self._trainer.device) for tensor in tensors.values()])
        teacher = [index for index, name in enumerate(tensors) if name.startswith("teacher.")]
        both = torch.stack([combined(sums), combined(sums[teacher[0] : teacher[-1] + 1] if teacher else sums[:0])])
        self._started.append((step, list(tensors), sums, self._exchange(both)))

    def finish(self) -> int | None:
        """Read the comparisons that were started.

        Returns:
            Checksum of the teacher's weights in the last of them, or None if there is none.

        Raises:
            RunFault: on all ranks; names those that differ from the majority, and the first tensor that differs.
        """
        started, self._started = self._started, []
        teachers: list[int] = []
        for step, names, sums, exchanged in started:
            found, teachers = map(list, zip(*exchanged.tolist(), strict=True))
            if len(set(found)) > 1:
                self._report(step, names, sums, found)
        return teachers[0] if teachers else None

    def _report(self, step: int, names: list[str], sums: Tensor, found: list[int]) -> NoReturn:
        by_tensor = zip(names, zip(*self._exchange(sums).tolist(), strict=True), strict=True)
        first = next(name for name, values in by_tensor if len(set(values)) > 1)
        raise RunFault(
            f"step {step}: {odd_ranks(found)}; the first tensor that differs is {first}. "
            "Nothing was saved since; run again to continue from the last checkpoint, on other nodes if it comes back"
        )

    def _exchange(self, values: Tensor) -> Tensor:
        """All ranks' values [n]: [W, n]."""
        gathered = values.new_empty(self._world * len(values))
        dist.all_gather_into_tensor(gathered, values)
        return gathered.view(self._world, -1)


def odd_ranks(sums: Sequence[int]) -> str:
    """Who differs from whom, by each rank's checksum, in words."""
    (most, count), *others = Counter(sums).most_common()
    if others and others[0][1] == count:
        groups = [[rank for rank, value in enumerate(sums) if value == group] for group in dict.fromkeys(sums)]
        return "ranks hold different models, and no majority says which is right: " + " / ".join(
            map(ranks_in_words, groups)
        )
    odd = [rank for rank, value in enumerate(sums) if value != most]
    verb = "holds another model" if len(odd) == 1 else "hold other models"
    return f"{ranks_in_words(odd)} {verb} than the other {count} ranks"
