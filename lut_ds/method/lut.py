"""MAE and LUT, of masked or otherwise degraded views: what a training step computes, as modules from pixels to losses.

MAE: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.
LUT: "Learning with Unmasked Tokens Drives Stronger Vision Learners", ECCV 2024.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from lut_kernels import gather_patches, reconstruction_loss
from torch import Tensor, nn

from lut_ds.method.decoder import Decoder
from lut_ds.method.degradations.base import Degradation
from lut_ds.method.encoder import Encoder
from lut_ds.method.masking import Masking, disjoint_masks
from lut_ds.method.pixels import IMAGENET_MEAN, IMAGENET_STD, area_resize, normalised

Projections = Sequence[Tensor] | Callable[[], Sequence[Tensor]]


def pixel_stats(pixels: Tensor) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std for uint8 HWC pixels; (None, None) for float CHW views, which are normalised already."""
    return (IMAGENET_MEAN, IMAGENET_STD) if pixels.dtype == torch.uint8 else (None, None)


def encode_views(encoder: Encoder, views: Sequence[Tensor], ids_keep: Sequence[Tensor] | None) -> Tensor:
    """Encode several views as one batch.

    Args:
        views: uint8 [B, S, S, 3] or normalised float [B, 3, S, S], one a view.
        ids_keep: int64 [B, K] a view; None encodes all L patches.

    Returns:
        [V*B, 1+K, D], view-major.
    """
    patch, dtype = encoder.patch_embed.patch_size[0], encoder.cls_token.dtype
    ids = list(ids_keep) if ids_keep is not None else [None] * len(views)
    rows = [gather_patches(v, i, patch, *pixel_stats(v), dtype=dtype) for v, i in zip(views, ids, strict=True)]
    all_ids = None if ids_keep is None else torch.cat(list(ids_keep))
    return encoder(torch.cat(rows), all_ids)


def clean_view(view: Tensor, side: int) -> Tensor:
    """A whole view at the encoder's side S: untouched, or where it was read at another side, float [B, 3, S, S]."""
    return view if view.shape[2] == side else area_resize(normalised(view), side)


def pool(latent: Tensor) -> Tensor:
    """Mean of the normed patch tokens, cls excluded: [B, 1+K, D] -> [B, D]."""
    return latent[:, 1:].mean(dim=1)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 - 2*cos(a, b), in fp32: [B, D], [B, D] -> [B]."""
    return 2 - 2 * F.cosine_similarity(a.float(), b.float(), dim=-1, eps=1e-12)


def bc_loss(student_q: Sequence[Tensor], teacher_q: Sequence[Tensor]) -> Tensor:
    """Broader-contextualization loss: symmetric, cross-view only; mean of d(q_2, t_1) and d(q_1, t_2). fp32 scalar."""
    (q1, q2), (t1, t2) = student_q, teacher_q
    return (cosine_distance(q2, t1).mean() + cosine_distance(q1, t2).mean()) / 2


def feature_spread(pooled: Tensor) -> Tensor:
    """Spread of pooled features over the batch: mean over D of the std of L2-normalised rows, times sqrt(D).

    About 1 for isotropic features, near 0 when all samples give the same feature (collapse). fp32 scalar, no gradient.
    """
    unit = F.normalize(pooled.detach().float(), dim=1)
    return unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5


class MAE(nn.Module):
    """Masked autoencoder over one view: only visible patches are embedded, only hidden ones predicted.

    With a `degradation` the encoder sees degraded views instead, masked or (mask_ratio 0) whole; all patches are predicted,
    and the degradation says what the target is and where the loss counts.
    """

    views = 1

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        *,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        degradation: Degradation | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.norm_pix = norm_pix
        self.degradation = degradation

    def mask(self, noise: Tensor) -> Masking:
        """Visible and hidden patches of each view from mask noise [B, L]."""
        return disjoint_masks(noise, self.mask_ratio, self.views)

    @torch.no_grad()
    def degrade(self, views: Sequence[Tensor], draws: Tensor | None) -> Sequence[Tensor]:
        """What the encoder sees of the views: themselves, or float32 [B, 3, S, S] each; draws [B, V*k] for V views."""
        if self.degradation is None:
            return views
        side = self.encoder.patch_embed.img_size[0]
        shares = self._draws(views[0], draws).chunk(len(views), dim=1)
        return [self.degradation.degrade(normalised(v), d, side) for v, d in zip(views, shares, strict=True)]

    def reconstruct(self, view: Tensor, latent: Tensor, masking: Masking, draws: Tensor | None = None) -> Tensor:
        """Reconstruction loss of view 1 (fp32 scalar) from its latents [B, 1+K, D] and, of a degradation, all draws."""
        patch = self.encoder.patch_embed.patch_size[0]
        if self.degradation is None:
            pred = self.decoder(latent, masking.ids_restore, masking.ids_hidden)
            stats = pixel_stats(view)
            return reconstruction_loss(pred, view, masking.ids_hidden, patch, *stats, norm_pix=self.norm_pix)
        pred = self.decoder(latent, masking.ids_restore)
        own = self._draws(view, draws)[:, : self.degradation.draws]
        # Without masking nothing is hidden, and every patch counts.
        counted = masking.mask(0) if masking.ids_hidden.shape[1] else torch.ones_like(masking.mask(0))
        return self.degradation.loss(pred, normalised(view), counted, own, patch, self.norm_pix)

    def _draws(self, view: Tensor, draws: Tensor | None) -> Tensor:
        assert self.degradation is not None
        expected = self.views * self.degradation.draws
        if draws is None and not expected:
            return torch.empty((len(view), 0), device=view.device)
        if draws is None or draws.shape != (len(view), expected):
            found = None if draws is None else list(draws.shape)
            raise ValueError(f"draws: expected [{len(view)}, {expected}] for the degradation, found {found}")
        return draws

    def forward(
        self,
        views: Sequence[Tensor],
        noise: Tensor,
        teacher_q: Projections | None = None,
        draws: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One micro-batch.

        Args:
            views: one tensor, uint8 [B, S, S, 3] or normalised float [B, 3, S, S]; of a degradation's own side.
            noise: float [B, L] mask noise.
            teacher_q: unused; MAE has no teacher.
            draws: float [B, k], uniform in [0, 1): the degradation's parameters; None where it has none.

        Returns:
            fp32 scalars: `loss` (to back-propagate), `mae`, `feature_spread`.
        """
        masking = self.mask(noise)
        latent = encode_views(self.encoder, self.degrade(views, draws), masking.ids_keep)
        loss = self.reconstruct(views[0], latent, masking, draws)
        return {"loss": loss, "mae": loss.detach(), "feature_spread": feature_spread(pool(latent))}


class LUT(MAE):
    """MAE on view 1, and heads that predict from each view's visible tokens what the teacher sees in all of the other."""

    views = 2

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        projector: nn.Module,
        predictor: nn.Module,
        *,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        degradation: Degradation | None = None,
        w_mae: float = 1.0,
        w_bc: float = 0.25,
    ) -> None:
        super().__init__(encoder, decoder, mask_ratio=mask_ratio, norm_pix=norm_pix, degradation=degradation)
        self.projector = projector
        self.predictor = predictor
        self.w_mae = w_mae
        self.w_bc = w_bc

    def predict(self, latent: Tensor) -> list[Tensor]:
        """Heads on the latents of all views [V*B, 1+K, D]: one [B, D] a view; batch statistics are per view, view 1 first."""
        return [self.predictor(self.projector(z)) for z in pool(latent).chunk(self.views)]

    def forward(
        self,
        views: Sequence[Tensor],
        noise: Tensor,
        teacher_q: Projections | None = None,
        draws: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One micro-batch.

        Args:
            views: two tensors, uint8 [B, S, S, 3] or normalised float [B, 3, S, S]; of a degradation's own side.
            noise: float [B, L] mask noise, shared by the views.
            teacher_q: the teacher's [B, D] for each view; or what gives them, called when they are needed.
            draws: float [B, 2k], uniform in [0, 1): the degradation's parameters for both views; None where it has none.

        Returns:
            fp32 scalars: `loss` = w_mae*mae + w_bc*bc (to back-propagate), `mae`, `bc`, `feature_spread`.
        """
        if teacher_q is None:
            raise ValueError("teacher_q: LUT needs the teacher's projections of both views, found None")
        masking = self.mask(noise)
        latent = encode_views(self.encoder, self.degrade(views, draws), masking.ids_keep)
        mae = self.reconstruct(views[0], latent[: len(noise)], masking, draws)
        predicted = self.predict(latent)
        bc = bc_loss(predicted, teacher_q() if callable(teacher_q) else teacher_q)
        loss = self.w_mae * mae + self.w_bc * bc
        return {"loss": loss, "mae": mae.detach(), "bc": bc.detach(), "feature_spread": feature_spread(pool(latent))}


class Teacher(nn.Module):
    """EMA teacher: encoder and projector over all patches of every view, eval mode, no gradient, no predictor."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode: batch norm uses running statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """views: uint8 [B, S, S, 3] or normalised float [B, 3, S, S] each -> one [B, D] projection a view.

        Views that a degradation had read at another side are taken clean and whole: resized to the encoder's.
        """
        side = self.encoder.patch_embed.img_size[0]
        whole = [clean_view(view, side) for view in views]
        return self.projector(pool(encode_views(self.encoder, whole, None))).chunk(len(views))
