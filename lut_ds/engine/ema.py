"""The EMA teacher's weights: fp32 shards beside the optimizer's, and the replica that runs the forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lut_ds.engine.shards import MasterShards
from lut_ds.method.fp8 import Fp8Linear


@torch.no_grad()
def ema_update_(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float | Tensor) -> None:
    """averages <- averages + weight * (values - averages), in place; weight is 1 - decay.

    Integer tensors (batch norm's counters) follow the same formula, truncated toward zero, as the reference.

    Args:
        averages, values: same shapes, fp32 or integer.
        weight: number or 0-dim tensor on the same device; 0 leaves every average as it is.
    """
    for average, value in zip(averages, values, strict=True):
        if average.is_floating_point():
            average.lerp_(value, weight)
        else:
            average.copy_((average.double() + weight * (value.double() - average.double())).trunc())


class WeightEMA:
    """Exponential moving average of the student's whole state, sharded like the optimizer.

    Every rank averages only the fp32 masters it owns; `refresh` gathers them, in the teacher's dtype, into the teacher's
    encoder and projector, and rounds them once more where it computes in fp8. Float and integer buffers (batch norm) are
    averaged on every rank; they are equal everywhere.

    Args:
        shards: this rank's masters.
        student: source of the buffers.
        teacher: encoder and projector named as in the student; its weights become the replica.
    """

    def __init__(self, shards: MasterShards, student: nn.Module, teacher: nn.Module) -> None:
        self.shards = shards
        self.flats = [flat.detach().clone() for flat in shards.flats]
        self._fp8 = {f"{name}.weight": m for name, m in teacher.named_modules() if isinstance(m, Fp8Linear)}
        self._plain = {name: p for name, p in teacher.named_parameters() if name not in self._fp8}
        self._dtype = next(iter(self._plain.values())).dtype
        own = dict(teacher.named_buffers())
        self._student_buffers = {name: b for name, b in student.named_buffers() if "pos_embed" not in name}
        # The teacher's own buffer tensors where it has them; the predictor's are averaged on their own.
        self.buffers = {name: own.get(name, b.detach().clone()) for name, b in self._student_buffers.items()}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Make the average an exact copy of the student."""
        for average, master in zip(self.flats, self.shards.flats, strict=True):
            average.copy_(master)
        for name, buffer in self._student_buffers.items():
            self.buffers[name].copy_(buffer)
        self.refresh()

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """One step with weight 1 - decay (0-dim, on the device; 0 where the optimizer step was not applied)."""
        ema_update_(self.flats, self.shards.flats, weight)
        ema_update_(list(self.buffers.values()), list(self._student_buffers.values()), weight)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather the averages into the teacher's weights; a collective."""
        whole = self.shards.assemble(self.flats, self._dtype, {*self._plain, *self._fp8})
        torch._foreach_copy_(list(self._plain.values()), [whole[name] for name in self._plain])
        for name, layer in self._fp8.items():
            layer.load_weight(whole[name])
