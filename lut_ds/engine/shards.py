"""Where this rank's fp32 masters live: a uniform view over DeepSpeed ZeRO stages 0 to 3.

Every stage becomes a list of flat fp32 tensors plus fragments: which part of which parameter sits at which offset.
EMA shards follow the same layout, and checkpoints store it, which is what lets another world size or stage read them.
Handles of DeepSpeed 0.19.8 that are not public are used here and nowhere else; tests hold them to unsharded references.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lut_ds.engine.optim import GuardedAdamW


@dataclass(frozen=True)
class Fragment:
    """`numel` values of parameter `name` from its flattened position `start`, at `offset` of flat tensor `flat`."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint's layout file."""
        return asdict(self)


class MasterShards:
    """This rank's fp32 masters after `deepspeed.initialize`.

    Attributes:
        stage: ZeRO stage.
        flats: flat fp32 tensors, the optimizer's own storage.
        fragments: layout of the parameters in them (padding is in no fragment).
        shapes: shape of every trainable parameter.
    """

    def __init__(self, engine: Any, student: nn.Module, stage: int) -> None:
        self.stage = stage
        self._engine = engine
        self._parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._names = {id(p): name for name, p in self._parameters.items()}
        self.shapes = {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}
        layouts = {0: self._whole, 1: self._flat_partitions, 2: self._flat_partitions, 3: self._parameter_partitions}
        self.flats: list[Tensor] = []
        self.fragments: list[Fragment] = []
        layouts[stage]()

    @property
    def sharded(self) -> bool:
        """Whether ranks own different parts (stage 0 replicates everything)."""
        return self.stage > 0

    @property
    def client(self) -> GuardedAdamW:
        """Our optimizer inside DeepSpeed's."""
        return self._engine.optimizer if self.stage == 0 else self._engine.optimizer.optimizer

    def moments(self, flat: int) -> dict[str, Tensor]:
        """AdamW's state of a flat tensor: exp_avg, exp_avg_sq (like the flat), step (scalar); created if not there yet."""
        parameter = self._state_key(flat)
        state = self.client.state[parameter]
        if not state:
            # The same zeros that the optimizer would make in its first step.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter.data)
            state["exp_avg_sq"] = torch.zeros_like(parameter.data)
        return {
            "exp_avg": state["exp_avg"].view(-1),
            "exp_avg_sq": state["exp_avg_sq"].view(-1),
            "step": state["step"],
        }

    @torch.no_grad()
    def publish(self) -> None:
        """Make the module's weights follow the masters after these were written (loading a checkpoint)."""
        optimizer = self._engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            for sub_group in range(len(self.flats)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def gather(self, flat: int, values: Tensor, dtype: torch.dtype) -> Tensor:
        """All ranks' parts of a flat tensor: [W, n] in `dtype`, from this rank's `values` [n] (stage 0: [1, n])."""
        local = values.to(dtype)
        world = dist.get_world_size() if self.sharded else 1
        if world == 1:
            return local.unsqueeze(0)
        gathered = torch.empty(world * local.numel(), dtype=dtype, device=local.device)
        dist.all_gather_into_tensor(gathered, local)
        return gathered.view(world, -1)

    def assemble(self, values: list[Tensor], dtype: torch.dtype, names: set[str] | None = None) -> dict[str, Tensor]:
        """Whole parameters [shape] in `dtype` from every rank's flat `values`; a collective for sharded stages.

        Flat tensors without any of `names` are not gathered; None takes all.
        """
        whole: dict[str, Tensor] = {}
        for index, flat_values in enumerate(values):
            if names is not None and names.isdisjoint(self._members(index)):
                continue
            gathered = self.gather(index, flat_values, dtype)
            for name, parts in self._locate(index, gathered):
                if names is None or name in names:
                    whole[name] = parts.view(self.shapes[name])
        return whole

    def _members(self, flat: int) -> list[str]:
        """Parameters in a flat tensor, whichever rank owns them."""
        if self.stage == 0:
            return [self.fragments[flat].name]
        optimizer = self._engine.optimizer
        groups = optimizer.fp16_groups if self.stage == 3 else optimizer.bit16_groups
        return [self._names[id(p)] for p in groups[flat]]

    def _locate(self, flat: int, gathered: Tensor) -> list[tuple[str, Tensor]]:
        """(name, flattened whole parameter) for every parameter of a gathered flat tensor; views where possible."""
        if self.stage == 3:
            pieces, offset = [], 0
            for p in self._engine.optimizer.fp16_groups[flat]:
                part = gathered[:, offset : offset + p.partition_numel()].reshape(-1)[: p.ds_numel]
                pieces.append((self._names[id(p)], part))
                offset += p.partition_numel()
            return pieces
        line = gathered.reshape(-1)
        if self.stage == 0:
            return [(self.fragments[flat].name, line)]
        base = self._engine.optimizer.bit16_groups_flat[flat].storage_offset()
        group = self._engine.optimizer.bit16_groups[flat]
        return [(self._names[id(p)], line.narrow(0, p.data.storage_offset() - base, p.numel())) for p in group]

    def _whole(self) -> None:
        for index, (name, parameter) in enumerate(self._parameters.items()):
            self.flats.append(parameter.data.view(-1))
            self.fragments.append(Fragment(name, 0, parameter.numel(), index, 0))

    def _flat_partitions(self) -> None:
        optimizer = self._engine.optimizer
        for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
            self.flats.append(master.data)
            flat, size = optimizer.bit16_groups_flat[index], master.numel()
            first = dist.get_rank() * size
            for p in optimizer.bit16_groups[index]:
                begin = p.data.storage_offset() - flat.storage_offset()
                low, high = max(begin, first), min(begin + p.numel(), first + size)
                if low < high:
                    self.fragments.append(Fragment(self._names[id(p)], low - begin, high - low, index, low - first))

    def _parameter_partitions(self) -> None:
        optimizer = self._engine.optimizer
        for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            self.flats.append(master.data)
            offset = 0
            for p in optimizer.fp16_groups[index]:
                part = p.partition_numel()
                start = dist.get_rank() * part
                numel = min(part, p.ds_numel - start)
                if numel > 0:
                    self.fragments.append(Fragment(self._names[id(p)], start, numel, index, offset))
                offset += part

    def _state_key(self, flat: int) -> nn.Parameter:
        if self.stage == 0:
            return self._parameters[self.fragments[flat].name]
        optimizer = self._engine.optimizer
        return (
            optimizer.single_partition_of_fp32_groups
            if self.stage in (1, 2)
            else optimizer.fp32_partitioned_groups_flat
        )[flat]
