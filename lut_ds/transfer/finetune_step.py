"""One step of fine-tuning through the engine that pre-trains: ZeRO, guards, the average and checkpoints are the same."""

import copy
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lut_ds.data.erasing import erase_
from lut_ds.engine.launch import Ranks
from lut_ds.engine.optim import layer_decay_groups
from lut_ds.engine.schedules import lr_at, peak_lr
from lut_ds.engine.step import Learner, Trainer
from lut_ds.method.pixels import normalised
from lut_ds.transfer.config import FinetuneRecipe
from lut_ds.transfer.finetune_loader import FinetuneBatch
from lut_ds.transfer.mixing import mix_images, soft_cross_entropy, soft_targets

SQRT_DIVISOR = 8.0  # of LUT's square-root rule in fine-tuning


class FinetuneSchedule:
    """Learning rate of a step before layer decay, and the decay of the average, from the recipe and the length of an epoch."""

    def __init__(self, recipe: FinetuneRecipe, steps_per_epoch: int) -> None:
        self._optim, self._epochs, self._per_epoch = recipe.optim, recipe.train.epochs, steps_per_epoch
        self.peak = peak_lr(recipe.optim.blr, recipe.train.global_batch, recipe.optim.lr_rule, SQRT_DIVISOR)
        self.total_steps = steps_per_epoch * recipe.train.epochs

    def lr(self, step: int) -> float:
        """Learning rate of a step (0-based): a function of the fractional epoch at its start."""
        return lr_at(step / self._per_epoch, self.peak, self._optim.min_lr, self._optim.warmup_epochs, self._epochs)

    def ema_decay(self, step: int) -> float:
        """Decay of the average, constant; 1 without an average."""
        return 1.0 if self._optim.ema_decay is None else self._optim.ema_decay


class FinetuneTrainer(Trainer):
    """A classifier under DeepSpeed; `teacher` is the average of its weights, if the recipe keeps one.

    Args:
        recipe: validated recipe.
        ranks: this process's place; the process group exists.
        model: with the weights it starts from, the same on every rank.
        micro_batch, accumulation: sizes that make up the global batch.
    """

    def __init__(
        self, recipe: FinetuneRecipe, ranks: Ranks, model: VisionTransformer, micro_batch: int, accumulation: int
    ) -> None:
        optim, self._smoothing, self._classes = recipe.optim, recipe.augment.smoothing, model.num_classes
        average = None
        if optim.ema_decay is not None:
            average = copy.deepcopy(model).to(ranks.device).eval().requires_grad_(False)
            dtype = torch.bfloat16 if recipe.precision.teacher == "bf16" else torch.float32
            average.to(dtype)
        model.set_grad_checkpointing(recipe.train.activation_checkpointing)
        student = model.to(ranks.device)
        groups = layer_decay_groups(
            student.named_parameters(), optim.weight_decay, optim.layer_decay, len(model.blocks)
        )
        self._set_up(recipe, Learner(student, average, ("loss",), groups), ranks, micro_batch, accumulation)
        self.engine.train()

    def _backward(self, batch: FinetuneBatch) -> dict[str, Tensor]:
        with self.clock:
            images = normalised(batch.views[0])
            erase_(images, batch.erasures)
            images = mix_images(images, batch.mixing)
            targets = soft_targets(batch.labels, self._classes, batch.mixing, self._smoothing)
            torch.manual_seed(batch.seed)  # stochastic depth: a resumed run drops the same paths
            logits = self.engine(images.to(next(self.student.parameters()).dtype))
            loss = soft_cross_entropy(logits, targets)
        self.engine.backward(loss)
        return {"loss": loss}

    @property
    def evaluated(self) -> Any:
        """The module whose accuracy counts: the average where there is one, else the student; logits of [B, 3, S, S]."""
        return self.teacher if self.teacher is not None else self.student

    def weights(self) -> dict[str, Tensor]:
        """Whole fp32 weights of `evaluated` on the CPU, by timm's names; a collective."""
        flats = self.ema.flats if self.ema is not None else self.shards.flats
        return {name: value.cpu().clone() for name, value in self.shards.assemble(flats, torch.float32).items()}
