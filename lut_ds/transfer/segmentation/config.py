"""The recipe of segmentation: the sections that pre-training shares, UPerNet, and ADE20K's protocol as defaults."""

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lut_ds.config import AdamW, Batches, Decay, Fraction, Guard, Positive, Precision, Run, Section, load_sections

Scale = Annotated[float, Field(gt=0)]


class SegmentModel(Section):
    """The encoder that is taken, and the heads on it."""

    source: str | None = None
    """Run, checkpoint or export folder; .safetensors or .pth of timm, LUT, MAE, MoCo v3, DINO, iBOT; timm:NAME[.TAG]
    or timm:NAME:FILE."""
    weights: Literal["ema", "student"] | None = None
    """Whose weights of the source; null: the average of the student's where there is one."""
    source_heads: Positive | None = None
    """Attention heads of a file whose size is not published."""
    image_size: Annotated[int, Field(ge=32)] = 512
    """Side of the crops and of the windows of the evaluation, pixels; positions are interpolated to its grid. The pyramid ends at
    stride 32."""
    patch_size: Positive | None = None
    """Expected of the source; null: whatever it has."""
    width: Positive | None = None
    """Likewise, embedding width D."""
    depth: Positive | None = None
    """Likewise, blocks."""
    layers: tuple[int, int, int, int] | None = None
    """Blocks (from 0) whose outputs make the pyramid; null: after 1/3, 1/2, 2/3 and all of them (3, 5, 7, 11 of 12)."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the last block; it rises linearly from 0 at the first."""
    channels: Positive = 512
    """Of UPerHead."""
    aux_channels: Positive = 256
    """Of the auxiliary head."""
    aux_weight: Annotated[float, Field(ge=0)] = 0.4
    """Weight of the auxiliary head's loss."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of both heads' last maps, by channel."""


class SegmentData(Section):
    """What is read, and what is done to the training images."""

    path: str | None = None
    """Folder with images/training, annotations/training, images/validation and annotations/validation."""
    classes: Annotated[int, Field(ge=2, le=255)] = 150
    """Classes that are told apart."""
    reduce_zero_label: bool = True
    """Mask value 0 is no class, and 1 is the first (ADE20K); false: 0 is the first. 255 is no class in any case."""
    scale: tuple[Scale, Scale] = (0.5, 2.0)
    """Range of the random size: the shorter side becomes image_size times this (the longer one at most four times that)."""
    cat_max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.75
    """A crop of which one class takes this share or more is drawn again, up to ten times."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Random brightness, contrast, saturation and hue."""
    stride: Positive | None = None
    """Step of the windows of the evaluation, pixels; null: two thirds of image_size (341 of 512)."""
    eval_batch: Positive = 4
    """Windows of a forward pass of an evaluation."""
    pictures: Annotated[int, Field(ge=0)] = 4
    """Validation images shown in predictions.png."""
    threads: Positive | None = None
    """Decoding threads of each rank; null: its cores, at most 8."""
    prefetch: Positive = 2
    """Micro-batches prepared ahead."""
    max_bad_share: Fraction = 0.01
    """Stop when more of the samples seen than this, or of 1,000 if that is more, cannot be read or decoded."""

    @field_validator("scale")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"expected [smallest, largest], found {list(value)}; swap them")
        return value


class SegmentOptim(AdamW):
    """How it is optimised: AdamW with layer decay, linear warm-up, then a polynomial decay, by step."""

    lr: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate of the heads at `train.global_batch`, before warm-up and decay."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end, before layer decay."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Of the decay: lr * (1 - step/iterations)^power."""
    warmup_steps: Annotated[int, Field(ge=0)] = 1500
    """Steps of linear warm-up from a millionth."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's moment decays."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay; none on 1-D tensors, cls token and positions."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    """A layer's learning rate over that of the layer after it; the heads are the last."""


class SegmentTrain(Batches):
    """How long, in which batches, and how it is distributed."""

    iterations: Positive = 160_000
    """Optimizer steps."""
    evaluate_every: Positive = 16_000
    """Steps between evaluations."""
    global_batch: Positive = 16
    """Images an optimizer step, over all ranks and accumulation."""


class SegmentRun(Run):
    """Where it goes and how it is watched."""

    keep_every_epochs: Positive | None = None
    """Checkpoints at multiples of this epoch are kept for ever; the best evaluation's model is kept in best/ in any case."""


class SegmentRecipe(Section):
    """A whole training of a segmenter."""

    model: SegmentModel = Field(default_factory=SegmentModel)
    data: SegmentData = Field(default_factory=SegmentData)
    optim: SegmentOptim = Field(default_factory=SegmentOptim)
    train: SegmentTrain = Field(default_factory=SegmentTrain)
    precision: Precision = Field(default_factory=Precision)
    guard: Guard = Field(default_factory=Guard)
    run: SegmentRun = Field(default_factory=SegmentRun)

    @property
    def stride(self) -> int:
        """Step of the windows of the evaluation, pixels."""
        return self.data.stride or max(1, 2 * self.model.image_size // 3)

    @model_validator(mode="after")
    def _combine(self) -> "SegmentRecipe":
        if self.stride > self.model.image_size:
            raise ValueError(
                f"data.stride {self.stride} is above model.image_size {self.model.image_size}: windows would leave gaps; lower it"
            )
        if self.optim.warmup_steps >= self.train.iterations:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} is not below train.iterations {self.train.iterations}; "
                "change one of them"
            )
        return self


def segment_folder() -> Path:
    """Folder of the shipped segmentation recipes."""
    return Path(str(resources.files("lut_ds"))) / "recipes" / "segment"


def load_segment_recipe(name_or_path: str, overrides: list[str]) -> SegmentRecipe:
    """Read a segmentation recipe by name or path and apply `section.key=value` overrides.

    Raises:
        UserError: unknown recipe or key (the nearest valid one is named), wrong type, impossible combination.
    """
    return load_sections(SegmentRecipe, name_or_path, overrides, segment_folder())
