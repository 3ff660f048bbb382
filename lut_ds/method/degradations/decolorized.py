"""De-colorized: one random mixture of the channels, to be coloured."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lut_ds.method.degradations.base import Degradation, register


@register("decolorized")
@dataclass(frozen=True)
class Decolorized(Degradation):
    """The encoder sees w_R R + w_G G + w_B B of the normalised channels, w ~ U(0, weight); the target is RGB, at all patches.

    The published encoder has one input channel. Here it keeps three, which are equal, so that it stays an encoder of images:
    its patch projection acts as one of one channel that holds the sum of its three filters.
    """

    weight: float = 0.667
    draws: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.weight <= 10:
            raise ValueError(f"weight: expected more than 0 and at most 10, found {self.weight}")

    def degrade(self, view: Tensor, draws: Tensor, side: int) -> Tensor:
        """The mixture by `weight` times the draws, three times."""
        mixed = (view * (self.weight * draws)[:, :, None, None]).sum(dim=1, keepdim=True)
        return mixed.expand_as(view).contiguous()
