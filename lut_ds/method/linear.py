"""Linear layers that take the faster product where two are at hand; names and values in a state dict are torch's."""

from lut_kernels import linear
from torch import Tensor, nn


class Linear(nn.Linear):
    """torch's linear layer through `lut_kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return linear(x, self.weight, self.bias)


def use_fast_linear(module: nn.Module) -> None:
    """Turn every plain linear layer inside `module` (timm's too) into a `Linear`, in place."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
