"""How it is optimised, how long, in which batches and numbers: the sections `optim`, `train` and `precision`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lut_ds.config.section import Decay, Positive, Section


class AdamW(Section):
    """The optimizer, whatever its schedule."""

    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay; none on 1-D tensors and biases."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Clip the gradient's L2 norm to this; null: no clipping (as the references)."""


class Optim(AdamW):
    """How it is optimised: AdamW, linear warm-up from 0, then a half cosine by fractional epoch."""

    blr: Annotated[float, Field(ge=0)] = 1.5e-4
    """Base learning rate; `lr_rule` makes the peak from it."""
    lr_rule: Literal["sqrt", "linear"] = "sqrt"
    """Peak: `sqrt` blr*sqrt(global_batch)/4 (LUT's code), `linear` blr*global_batch/256 (MAE)."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 40.0
    """Epochs of linear warm-up."""


class Batches(Section):
    """In which batches, and how they are distributed. Below `global_batch`, nothing should change results."""

    global_batch: Positive = 4096
    """Images an optimizer step, over all ranks and accumulation."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps; schedules keep their length."""
    micro_batch: Positive | None = None
    """Images a rank and forward pass; null: global_batch / world size. Accumulation follows from it."""
    deepspeed: str = "zero1"
    """Name of a file in ds_configs, or a path."""
    deepspeed_override: dict[str, Any] = Field(default_factory=dict)
    """Keys merged over that file."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of the blocks (with ZeRO-3 the teacher's only); `auto`: on a GPU."""

    @model_validator(mode="after")
    def _divides(self) -> "Batches":
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.micro_batch {self.micro_batch} does not divide train.global_batch {self.global_batch}; change one of them"
            )
        return self


class Train(Batches):
    """How long, in which batches, and how it is distributed."""

    epochs: Positive = 1600
    """Length of the schedules, epochs."""
    overlap_teacher: bool = False
    """On a GPU, run the teacher's pass on a stream of its own, beside the student's; takes more memory. Not measured yet."""


class Precision(Section):
    """In which numbers."""

    compute: Literal["fp32", "bf16"] = "bf16"
    """Student's weights and activations; masters, moments and EMA are fp32 always."""
    teacher: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Teacher's replica and activations; `fp8`: e4m3 in its blocks' linear layers, bf16 elsewhere (from Ada and Hopper on)."""
