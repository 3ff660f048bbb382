"""Zoomed-in: the encoder sees the centre of a view, and the whole view is to be drawn."""

from dataclasses import dataclass

from torch import Tensor

from lut_ds.method.degradations.base import Degradation, register, weighted_mean
from lut_ds.method.pixels import area_resize, patch_targets, redrawn, to_image, to_patches


@register("zoomed_in")
@dataclass(frozen=True)
class ZoomedIn(Degradation):
    """The encoder sees the centre S of a view of side V = S + 2*margin; the prediction is the whole view, drawn at side S.

    The loss has two parts. Centre: the prediction enlarged to V and cropped, against the patches of what the encoder saw;
    with masking at the hidden ones. Edge: the enlarged prediction against the view, over the four bands of the margin, the sum
    of their means. At S = 224: margin 32, V = 288. Masking and zoom together are the paper's integrated version.
    The published code cannot run without masking; the centre then counts at all patches here.

    Attributes:
        margin: of a side, as a fraction of S (rounded to pixels).
        w_centre, w_edge: weights of the two parts.
    """

    loss_on: str = "hidden"
    margin: float = 1 / 7
    w_centre: float = 0.8
    w_edge: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.margin <= 1:
            raise ValueError(f"margin: expected more than 0 and at most 1, found {self.margin}")
        if self.w_centre < 0 or self.w_edge < 0:
            raise ValueError(f"w_centre, w_edge: expected at least 0, found {self.w_centre}, {self.w_edge}")
        if self.w_centre + self.w_edge == 0:
            raise ValueError("w_centre, w_edge: both are 0, which leaves nothing to learn; raise one")

    def view_side(self, side: int) -> int:
        """S and the margin on both sides."""
        pixels = round(side * self.margin)
        if pixels < 1:
            raise ValueError(f"margin: {self.margin} is less than one pixel of {side}; raise it")
        return side + 2 * pixels

    def degrade(self, view: Tensor, draws: Tensor, side: int) -> Tensor:
        """The centre of the view."""
        return _centre(view, side)

    def loss(
        self, pred: Tensor, view: Tensor, counted: Tensor, draws: Tensor, patch_size: int, norm_pix: bool
    ) -> Tensor:
        """w_centre * centre + w_edge * edge; see the class and `Degradation.loss`."""
        centre, edge = self.parts(pred, view, counted, patch_size, norm_pix)
        return self.w_centre * centre + self.w_edge * edge

    def parts(
        self, pred: Tensor, view: Tensor, counted: Tensor, patch_size: int, norm_pix: bool
    ) -> tuple[Tensor, Tensor]:
        """The two parts of the loss before their weights."""
        image = to_image(pred.float(), patch_size)
        side, full = image.shape[2], view.shape[2]
        drawn = area_resize(image, full)
        target = patch_targets(_centre(view, side), patch_size, norm_pix)
        errors = (to_patches(_centre(drawn, side), patch_size) - target).square().mean(dim=2)
        centre = errors.mean() if self.loss_on == "all" else weighted_mean(errors, counted)
        return centre, _edge_mean((drawn - redrawn(view, side, patch_size, norm_pix)).square(), side)


def _centre(image: Tensor, side: int) -> Tensor:
    margin = (image.shape[2] - side) // 2
    return image[:, :, margin : margin + side, margin : margin + side]


def _edge_mean(error: Tensor, side: int) -> Tensor:
    """Sum of the means over the bands around the centre: whole rows above and below, the rest left and right."""
    margin = (error.shape[2] - side) // 2
    rows = error[:, :, margin:-margin]
    bands = (error[:, :, :margin], error[:, :, -margin:], rows[..., :margin], rows[..., -margin:])
    return sum((band.mean() for band in bands[1:]), bands[0].mean())
