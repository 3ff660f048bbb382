"""What is learned: the sections `model` and `method`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lut_ds.config.section import Fraction, Positive, Section
from lut_ds.method.posembed import Positions


class Model(Section):
    """Shape of the encoder and decoder."""

    image_size: Positive = 224
    """Side of a view, pixels."""
    patch_size: Positive = 16
    """Side of a patch, pixels."""
    width: Positive = 768
    """Encoder embedding width D."""
    depth: Positive = 12
    """Encoder blocks."""
    heads: Positive = 12
    """Encoder attention heads."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of the encoder's and decoder's MLPs over their width."""
    decoder_width: Positive = 512
    """Decoder embedding width."""
    decoder_depth: Positive = 8
    """Decoder blocks."""
    decoder_heads: Positive = 16
    """Decoder attention heads."""
    positions: Positions = "sincos_2d"
    """Fixed positions of encoder and decoder: `sincos_2d` (MAE, LUT), or `sinusoid_1d` over the raster index (Beyond Masking)."""

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """L, patches of an image."""
        return self.grid**2

    @property
    def patch_dim(self) -> int:
        """P*P*3, values of a patch."""
        return self.patch_size**2 * 3

    @model_validator(mode="after")
    def _fits(self) -> "Model":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; change one of them"
            )
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, prefix + "width"), getattr(self, prefix + "heads")
            if width % heads:
                raise ValueError(f"{prefix}width {width} is not divisible by {prefix}heads {heads}; change one of them")
            if width % 4:
                raise ValueError(f"{prefix}width {width} is not divisible by 4, which sine-cosine positions need")
        return self


class Method(Section):
    """What is learned."""

    name: Literal["lut", "mae"] = "lut"
    """`lut`: two views and an EMA teacher; `mae`: one view, no teacher."""
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of hidden patches of each view; 0, with a degradation only: none."""
    degradation: str = "none"
    """What else is taken from the student's views: none, the name of a file of `lut_ds/method/degradations`, or FILE.py:CLASS."""
    degradation_params: dict[str, float | str] = Field(default_factory=dict)
    """Parameters of the degradation that differ from its defaults."""
    norm_pix: bool = True
    """Normalise each target patch by its own mean and variance."""
    w_mae: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the reconstruction loss."""
    w_bc: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the broader-contextualization loss."""
    projector_depth: Annotated[int, Field(ge=0)] = 2
    """Linear layers of the projector (0: identity)."""
    predictor_depth: Annotated[int, Field(ge=0)] = 2
    """Linear layers of the predictor (0: identity)."""
    head_hidden: Positive = 4096
    """Hidden width of both heads."""
    head_norm: Literal["bn", "ln", "none"] = "bn"
    """Norm inside the heads; `bn` is synchronised across ranks."""
    head_act: Literal["relu", "gelu"] = "relu"
    """Activation inside the heads."""
    ema_decay: Fraction = 0.996
    """EMA decay at the first step; a half cosine takes it to `ema_decay_end` at the end of the run."""
    ema_decay_end: Fraction = 1.0
    """EMA decay at the end; with both 0 the teacher is the student of the step before, without an average."""

    @property
    def views(self) -> int:
        """Views of each image that a step reads."""
        return 2 if self.name == "lut" else 1
