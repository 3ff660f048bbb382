"""LARS as in MAE's linear probe (You et al., "Large Batch Training of Convolutional Networks", 2017)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose matrices are scaled by a trust ratio.

    Tensors of more than one dimension: g += weight_decay * p, then g *= trust * |p| / |g| (1 where either norm is 0).
    All: buffer = momentum * buffer + g; p -= lr * buffer.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("LARS takes no closure")
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                direction = _scaled(p, p.grad, group["weight_decay"], group["trust"]) if p.dim() > 1 else p.grad
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(direction)
                p.sub_(buffer, alpha=group["lr"])


def _scaled(p: Tensor, gradient: Tensor, weight_decay: float, trust: float) -> Tensor:
    direction = gradient.add(p, alpha=weight_decay)
    weight, update = p.norm(), direction.norm()
    ratio = torch.where((weight > 0) & (update > 0), trust * weight / update, torch.ones_like(weight))
    return direction * ratio
