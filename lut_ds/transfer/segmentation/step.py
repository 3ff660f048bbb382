"""One step of segmentation through the engine that pre-trains: ZeRO, guards and checkpoints are the same."""

from collections.abc import Callable

import torch
from torch import Tensor

from lut_ds.engine.launch import Ranks
from lut_ds.engine.optim import layer_decay_groups
from lut_ds.engine.step import Learner, Trainer
from lut_ds.transfer.segmentation.config import SegmentRecipe
from lut_ds.transfer.segmentation.folder import IGNORED
from lut_ds.transfer.segmentation.loader import SegmentBatch
from lut_ds.transfer.segmentation.upernet import Segmenter, resized

_WARMUP_RATIO = 1e-6  # of the learning rate at the first step


class SegmentSchedule:
    """Polynomial decay by step, under a linear warm-up (`poly` of the published configurations)."""

    def __init__(self, recipe: SegmentRecipe) -> None:
        self._optim = recipe.optim
        self.total_steps = recipe.train.iterations

    def lr(self, step: int) -> float:
        """Learning rate of the heads in a step (0-based)."""
        o = self._optim
        decayed = (o.lr - o.min_lr) * (1 - step / self.total_steps) ** o.power + o.min_lr
        if step >= o.warmup_steps:
            return decayed
        return decayed * (1 - (1 - step / o.warmup_steps) * (1 - _WARMUP_RATIO))

    def ema_decay(self, step: int) -> float:
        """1: there is no average."""
        return 1.0


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross entropy in float32 of `logits` [B, classes, h, w], resized to `masks` [B, S, S]: 0-dim.

    The mean is over all pixels, those without a class counting as 0, as in the published protocol; so it is the same however
    a batch is shared between ranks.
    """
    told = resized(logits.float(), masks.shape[1:]).log_softmax(dim=1)
    counted = masks != IGNORED
    # Gathered, because torch's own loss of maps has no kernel that repeats to the bit on GPUs.
    right = told.gather(1, torch.where(counted, masks, 0).long()[:, None])[:, 0]
    return -torch.where(counted, right, 0.0).sum() / masks.numel()


class SegmentTrainer(Trainer):
    """A segmenter under DeepSpeed.

    Args:
        recipe: validated recipe.
        ranks: this process's place; the process group exists.
        model: with the weights it starts from, the same on every rank.
        normalised: uint8 [B, S, S, 3] -> float32 [B, 3, S, S] as the encoder expects it.
        micro_batch, accumulation: sizes that make up the global batch.
    """

    def __init__(
        self,
        recipe: SegmentRecipe,
        ranks: Ranks,
        model: Segmenter,
        normalised: Callable[[Tensor], Tensor],
        micro_batch: int,
        accumulation: int,
    ) -> None:
        optim, self._aux_weight, self._normalised = recipe.optim, recipe.model.aux_weight, normalised
        model.encoder.set_grad_checkpointing(recipe.train.activation_checkpointing)
        model = model.to(ranks.device)
        depth = len(model.encoder.blocks)
        groups = layer_decay_groups(
            model.named_parameters(), optim.weight_decay, optim.layer_decay, depth, prefix="encoder."
        )
        self._set_up(recipe, Learner(model, None, ("loss", "main", "aux"), groups), ranks, micro_batch, accumulation)
        self.engine.train()

    def _backward(self, batch: SegmentBatch) -> dict[str, Tensor]:
        images = self._normalised(batch.views[0]).to(next(self.student.parameters()).dtype)
        torch.manual_seed(batch.seed)  # stochastic depth and dropout: a resumed run drops the same
        logits, auxiliary = self.engine(images)
        main, aux = pixel_loss(logits, batch.masks), pixel_loss(auxiliary, batch.masks)
        loss = main + self._aux_weight * aux
        self.engine.backward(loss)
        return {"loss": loss, "main": main, "aux": aux}

    def logits(self, pixels: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> float32 logits [B, classes, S, S]; the student must be in eval mode."""
        images = self._normalised(pixels).to(next(self.student.parameters()).dtype)
        return resized(self.student(images).float(), pixels.shape[1:3])

    def weights(self) -> dict[str, Tensor]:
        """Whole fp32 parameters and the buffers, on the CPU; a collective."""
        found = self.shards.assemble(self.shards.flats, torch.float32) | dict(self.student.named_buffers())
        return {name: value.cpu().clone() for name, value in found.items()}
