"""Stochastic depth whose rate is no constant for torch.compile: all blocks of a model share one graph."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class SharedDropPath(DropPath):
    """timm's stochastic depth by sample (Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016).

    timm's reads its rate as a number, which the compiler takes for a constant: a graph for each block, and none after the
    eighth. `keep` is a 0-dim tensor on the CPU, wherever the model is: kernels get its value without a copy.
    """

    keep: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] of the same shape: in training, samples are 0 at the rate `drop_prob`, and the others scaled up."""
        if not self.training:
            return x
        drawn = torch.rand((len(x), *[1] * (x.dim() - 1)), device=x.device)
        return x * ((drawn < self.keep) / self.keep).to(x.dtype)


def share_drop_paths(module: nn.Module) -> None:
    """Turn every stochastic depth of timm inside `module` into a `SharedDropPath`, in place."""
    layer: Any
    for layer in module.modules():
        if type(layer) is DropPath:
            layer.__class__ = SharedDropPath
            layer.keep = torch.tensor(1 - layer.drop_prob, dtype=torch.float32, device="cpu")
