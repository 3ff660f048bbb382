"""The recipe of fine-tuning: the sections that pre-training shares, a classifier, and what is done to its images."""

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lut_ds.config import (
    Area,
    Batches,
    Decay,
    Fraction,
    Guard,
    ImageData,
    Optim,
    Positive,
    Precision,
    Run,
    Section,
    Strength,
    load_sections,
)
from lut_ds.data.randaugment import parse_randaugment
from lut_ds.transfer.classifier import Pool


class FinetuneModel(Section):
    """Shape of the classifier, and the weights that it starts from."""

    source: str | None = None
    """Run, checkpoint or export folder, a file of timm, LUT, MAE, MoCo v3, DINO or iBOT, timm:NAME:FILE or timm:NAME.TAG (what
    timm publishes); timm:NAME alone starts from random weights."""
    weights: Literal["ema", "student"] = "student"
    """Whose weights of the source: the student's (as MAE, LUT and MoCo v3 do), or the EMA teacher's (as DINO and iBOT do)."""
    image_size: Positive = 224
    """Side of the images, pixels; positions are interpolated to its grid."""
    patch_size: Positive = 16
    """Side of a patch, pixels."""
    width: Positive = 768
    """Embedding width D."""
    depth: Positive = 12
    """Blocks."""
    heads: Positive = 12
    """Attention heads."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of the MLPs over D."""
    pool: Pool = "mean"
    """Mean of the patch tokens, then a norm of its own; or the cls token after the final norm."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the last block; it rises linearly from 0 at the first."""
    head_std: Annotated[float, Field(ge=0)] = 2e-5
    """Standard deviation of the head's initial weights (truncated normal)."""

    @model_validator(mode="after")
    def _fits(self) -> "FinetuneModel":
        for large, small in (("image_size", "patch_size"), ("width", "heads")):
            a, b = getattr(self, large), getattr(self, small)
            if a % b:
                raise ValueError(f"{large} {a} is not divisible by {small} {b}; change one of them")
        return self


class FinetuneData(ImageData):
    """What is read, and how it is cropped. Evaluation: Resize(int(S/.875)) bicubic and a central crop of S; above 224 px
    Resize(S).

    The threads also run RandAugment: as many more for it.
    """

    path: str | None = None
    """Image folder with train/<class>/*.jpg and val/<class>/*.jpg, or a source of your own: package.module:factory?argument."""
    crop_scale: tuple[Area, Area] = (0.08, 1.0)
    """Area range of RandomResizedCrop (bicubic)."""
    eval_batch: Positive = 128
    """Images a rank and forward pass of an evaluation."""


class Augment(Section):
    """What is done to the training images beyond crop and flip, and to their labels."""

    randaugment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation (set inc1), or none. It runs on the CPU, on PIL images; then images are decoded there too."""
    mixup: Strength = 0.8
    """Beta parameter of mixup; 0: off."""
    cutmix: Strength = 1.0
    """Beta parameter of CutMix; 0: off."""
    mix_prob: Fraction = 1.0
    """Probability that a micro-batch is mixed."""
    switch_prob: Fraction = 0.5
    """Probability of CutMix where both are on."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Label smoothing."""
    erasing: Fraction = 0.25
    """Probability that a rectangle of an image becomes noise (random erasing, timm's mode pixel)."""

    @field_validator("randaugment")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "none":
            parse_randaugment(value)
        return value


class FinetuneOptim(Optim):
    """How it is optimised: AdamW with layer decay, linear warm-up from 0, then a half cosine by fractional epoch."""

    blr: Annotated[float, Field(ge=0)] = 1e-3
    """Base learning rate; `lr_rule` makes the peak from it."""
    lr_rule: Literal["sqrt", "linear"] = "sqrt"
    """Peak: `sqrt` blr*sqrt(global_batch)/8 (LUT's code), `linear` blr*global_batch/256 (MAE); equal at 1024."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end, before layer decay."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5.0
    """Epochs of linear warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's moment decays."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay; none on 1-D tensors, cls token and positions."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """A layer's learning rate over that of the layer after it."""
    ema_decay: Decay | None = None
    """Keep an average of the weights with this decay a step, and evaluate that; null: evaluate the weights."""


class FinetunePrecision(Precision):
    """In which numbers."""

    teacher: Literal["fp32", "bf16"] = "fp32"
    """Replica of the average (optim.ema_decay), which is what is evaluated."""


class FinetuneTrain(Batches):
    """How long, in which batches, and how it is distributed."""

    epochs: Positive = 100
    """Length of the schedules, epochs."""
    global_batch: Positive = 1024
    """Images an optimizer step, over all ranks and accumulation."""


class FinetuneRun(Run):
    """Where it goes and how it is watched."""

    keep_every_epochs: Positive | None = None
    """Checkpoints at multiples of this epoch are kept for ever; the best epoch's model is kept in best/ in any case."""


class FinetuneRecipe(Section):
    """A whole fine-tuning."""

    model: FinetuneModel = Field(default_factory=FinetuneModel)
    data: FinetuneData = Field(default_factory=FinetuneData)
    augment: Augment = Field(default_factory=Augment)
    optim: FinetuneOptim = Field(default_factory=FinetuneOptim)
    train: FinetuneTrain = Field(default_factory=FinetuneTrain)
    precision: FinetunePrecision = Field(default_factory=FinetunePrecision)
    guard: Guard = Field(default_factory=Guard)
    run: FinetuneRun = Field(default_factory=FinetuneRun)

    @model_validator(mode="after")
    def _combine(self) -> "FinetuneRecipe":
        if self.optim.warmup_epochs > 0 and self.optim.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs} is not below train.epochs {self.train.epochs}; change one of them"
            )
        return self


def finetune_folder() -> Path:
    """Folder of the shipped fine-tuning recipes."""
    return Path(str(resources.files("lut_ds"))) / "recipes" / "finetune"


def load_finetune_recipe(name_or_path: str, overrides: list[str]) -> FinetuneRecipe:
    """Read a fine-tuning recipe by name or path and apply `section.key=value` overrides.

    Raises:
        UserError: unknown recipe or key (the nearest valid one is named), wrong type, impossible combination.
    """
    return load_sections(FinetuneRecipe, name_or_path, overrides, finetune_folder())
