"""Projector and predictor heads on pooled features (LUT section 3; BYOL-style MLPs without biases)."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lut_ds.method.linear import Linear

HeadNorm = Literal["bn", "ln", "none"]
HeadAct = Literal["relu", "gelu"]


class HeadBatchNorm(nn.BatchNorm1d):
    """Batch norm over [B, D] or maps [B, D, ...], in fp32 whatever the weights' dtype, statistics optionally shared between ranks.

    `all_reduce_sum` is set by whoever knows about ranks: a differentiable function that sums a tensor over them. It makes
    training statistics those of the batches of all ranks together; every rank must call with the same shape.
    """

    all_reduce_sum: Callable[[Tensor], Tensor] | None = None
    world_size: int = 1

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        if not self.training or self.all_reduce_sum is None:
            if self.training and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            y = F.batch_norm(
                x.float(),
                self.running_mean,
                self.running_var,
                weight,
                bias,
                self.training,
                self.momentum or 0.0,
                self.eps,
            )
            return y.to(x.dtype)
        return self._synchronised(x.float(), weight, bias).to(x.dtype)

    def _synchronised(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        assert self.all_reduce_sum is not None
        over = [d for d in range(x.dim()) if d != 1]
        count = x.numel() // x.shape[1] * self.world_size

        def spread(values: Tensor) -> Tensor:
            return values.view(1, -1, *[1] * (x.dim() - 2))

        mean = self.all_reduce_sum(x.sum(over)) / count
        centred = x - spread(mean)
        var = self.all_reduce_sum(centred.square().sum(over)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            momentum = self.momentum or 0.0
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((var * count / max(count - 1, 1)).to(self.running_var.dtype), momentum)
        return centred * spread(torch.rsqrt(var + self.eps)) * spread(weight) + spread(bias)


def make_head(depth: int, width: int, hidden: int, norm: HeadNorm, act: HeadAct) -> nn.Sequential:
    """MLP [B, D] -> [B, D]: (linear without bias, norm, activation) x (depth-1), then a linear without norm.

    Depth 0 is the identity. Linear i sits at index 3*i with a norm and 2*i without (the reference's names).
    """
    norms: dict[HeadNorm, Callable[[], list[nn.Module]]] = {
        "bn": lambda: [HeadBatchNorm(hidden)],
        "ln": lambda: [nn.LayerNorm(hidden, eps=1e-6)],
        "none": list,
    }
    acts: dict[HeadAct, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
    layers: list[nn.Module] = []
    for index in range(depth):
        last = index == depth - 1
        linear = Linear(width if index == 0 else hidden, width if last else hidden, bias=False)
        nn.init.xavier_uniform_(linear.weight)
        layers.append(linear)
        if not last:
            layers += [*norms[norm](), acts[act]()]
    return nn.Sequential(*layers)
