"""Random masking by per-sample shuffling (MAE section 3) with disjoint visible sets for two views (LUT section 3)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """Which patches each view's encoder sees.

    Attributes:
        ids_shuffle: int64 [B, L], the permutation both views share.
        ids_restore: int64 [B, L], its inverse.
        ids_keep: one int64 [B, K] a view, disjoint between views unless nothing is masked.
        ids_hidden: int64 [B, L-K], the patches that view 1's encoder does not see (the ones to reconstruct).
    """

    ids_shuffle: Tensor
    ids_restore: Tensor
    ids_keep: tuple[Tensor, ...]
    ids_hidden: Tensor

    def mask(self, view: int) -> Tensor:
        """float32 [B, L] of a view: 0 where its encoder sees the patch, 1 where it does not."""
        mask = torch.ones(self.ids_shuffle.shape, device=self.ids_shuffle.device)
        return mask.scatter_(1, self.ids_keep[view], 0.0)


def keep_count(patches: int, mask_ratio: float) -> int:
    """Number of visible patches: L*(1-ratio) computed in floating point and truncated, as the references do.

    The rounding matters: 25 patches at ratio 0.8 give 4.9999999, so 4 patches, not 5.
    """
    return int(patches * (1 - mask_ratio))


def disjoint_masks(noise: Tensor, mask_ratio: float, views: int) -> Masking:
    """Split one permutation of the patches between the views.

    Args:
        noise: float [B, L]; ascending order defines the permutation (ties broken by index).
        mask_ratio: share of hidden patches, at least 0.5 for two views; or 0: every view shows all, in raster order.
        views: 1 (MAE) or 2 (LUT).

    Raises:
        ValueError: if the views' visible sets would overlap or be empty.
    """
    patches = noise.shape[1]
    if mask_ratio == 0:
        raster = torch.arange(patches, device=noise.device).repeat(len(noise), 1)
        return Masking(raster, raster, (raster,) * views, raster[:, :0])
    keep = keep_count(patches, mask_ratio)
    if keep < 1 or keep * views > patches:
        raise ValueError(
            f"mask_ratio: {mask_ratio} keeps {keep} of {patches} patches; {views} disjoint views need 1..{patches // views}"
        )
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    ids_keep = tuple(ids_shuffle[:, view * keep : (view + 1) * keep] for view in range(views))
    return Masking(ids_shuffle, ids_restore, ids_keep, ids_shuffle[:, keep:])
