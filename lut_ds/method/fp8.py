"""Linear layers of a frozen network in fp8: weights kept in 8 bits, activations rounded as they come."""

import torch
from lut_kernels.fp8 import E4M3, fp8_linear, quantise_rows
from torch import Tensor, nn


class Fp8Linear(nn.Linear):
    """A linear layer whose `weight` is e4m3 [N, K] with `weight_scale` fp32 [N, 1]; the bias keeps its dtype. No gradient.

    Neither is for a checkpoint: both follow from the weights that `load_weight` was given.
    """

    weight_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of x."""
        return fp8_linear(x, self.weight, self.weight_scale, self.bias)

    @torch.no_grad()
    def load_weight(self, weight: Tensor) -> None:
        """Take the weights [N, K], of any floating dtype, each output's row rounded by a scale of its own."""
        rows, scale = quantise_rows(weight)
        self.weight.copy_(rows)
        self.weight_scale.copy_(scale)


def use_fp8_linear(module: nn.Module) -> None:
    """Turn every linear layer inside `module` into an `Fp8Linear`, in place; frozen from then on."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            layer.__class__ = Fp8Linear
            layer.weight = nn.Parameter(torch.empty_like(weight, dtype=E4M3), requires_grad=False)
            layer.register_buffer(
                "weight_scale", weight.new_empty((len(weight), 1), dtype=torch.float32), persistent=False
            )
            layer.load_weight(weight)  # type: ignore[operator]  # it is an Fp8Linear now
