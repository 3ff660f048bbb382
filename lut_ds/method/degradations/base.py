"""What a degradation is, and the registry of them."""

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
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


def rehearse(degradation: Degradation, side: int, patch_size: int) -> None:
    """Try a degradation on two images, as a step will; ValueError unless what comes out can be trained on.

    Args:
        degradation: of a user's own, of which nothing is known.
        side, patch_size: of the encoder, pixels.
    """
    patches = (side // patch_size) ** 2
    view = torch.linspace(-2, 2, degradation.view_side(side) ** 2).view(1, 1, degradation.view_side(side), -1)
    draws = torch.full((2, degradation.draws), 0.5)
    pred = torch.zeros(2, patches, 3 * patch_size**2, requires_grad=True)
    counted = torch.ones(2, patches)
    try:
        with torch.no_grad():
            seen = degradation.degrade(view.repeat(2, 3, 1, 1), draws, side)
        loss = degradation.loss(pred, view.repeat(2, 3, 1, 1), counted, draws, patch_size, norm_pix=True)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"expected it to take images of {side} px, found {reason} ({last.filename}:{last.lineno})"
        ) from error
    _expect("degrade", seen, (2, 3, side, side))
    _expect("loss", loss, ())
    if not loss.requires_grad:
        raise ValueError("loss: expected a gradient for `pred`, found none; compute it from `pred`")


def _expect(what: str, found: object, shape: tuple[int, ...]) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"{what}: expected a tensor, found {type(found).__name__}")
    if found.shape != shape or found.dtype != torch.float32:
        raise ValueError(f"{what}: expected float32 {list(shape)}, found {str(found.dtype)[6:]} {list(found.shape)}")
    if not found.isfinite().all():
        raise ValueError(f"{what}: expected finite values, found others, of images between -2 and 2")
