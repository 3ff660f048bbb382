"""What a degradation is, and the registry of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch.nn.functional as F
from torch import Tensor

from lut_ds.method.pixels import patch_targets

DEGRADATIONS: dict[str, "type[Degradation]"] = {}
D = TypeVar("D", bound="type[Degradation]")


def register(name: str) -> Callable[[D], D]:
    """Class decorator: `method.degradation: name` means this class."""

    def add(cls: D) -> D:
        if name in DEGRADATIONS or name == "none":
            raise ValueError(f"degradation {name}: registered twice")
        DEGRADATIONS[name] = cls
        return cls

    return add


@dataclass(frozen=True)
class Degradation(ABC):
    """What the encoder sees, what the target is, where the loss counts.

    A subclass is a frozen dataclass of float, int and str fields with defaults, which `method.degradation_params` changes. It
    must say `degrade`; the rest is right for one that keeps the image in its place: the target is the clean image.
    Everything runs on the device of the images, for a whole batch at once, without reading a value back to the host.

    Shapes: B images, S the encoder's side, V the side of the views that are read, P the patch's, L = (S/P)^2. Views are
    normalised by ImageNet's mean and standard deviation.

    Attributes:
        draws: uniform numbers in [0, 1) that one view of one sample needs.
        loss_on: "all" patches, or "hidden": those the encoder does not see. Without masking both mean all.
    """

    loss_on: str = "all"
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.loss_on not in ("all", "hidden"):
            raise ValueError(f"loss_on: expected all or hidden, found {self.loss_on}")

    def view_side(self, side: int) -> int:
        """V for an encoder that takes images of side S; ValueError where none fits."""
        return side

    @abstractmethod
    def degrade(self, view: Tensor, draws: Tensor, side: int) -> Tensor:
        """What the encoder sees: float32 [B, 3, V, V] and draws [B, draws] -> [B, 3, S, S]. No gradient is asked for."""

    def loss(
        self, pred: Tensor, view: Tensor, counted: Tensor, draws: Tensor, patch_size: int, norm_pix: bool
    ) -> Tensor:
        """Reconstruction loss, an fp32 scalar with a gradient for `pred`; here the squared error to the clean patches.

        Args:
            pred: [B, L, P*P*3], the decoder's prediction for every patch.
            view: float32 [B, 3, V, V], what was degraded.
            counted: float32 [B, L], 1 where a patch counts (see `loss_on`), else 0.
            draws: as for `degrade`.
            norm_pix: normalise target patches (`method.pixels.patch_targets`).
        """
        target = patch_targets(view, patch_size, norm_pix)
        if self.loss_on == "all":
            return F.mse_loss(pred.float(), target)
        return weighted_mean((pred.float() - target).square().mean(dim=2), counted)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """sum(weights * values) / sum(weights), both [B, L]: a mean over the whole batch."""
    return (values * weights).sum() / weights.sum()
