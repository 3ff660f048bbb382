"""The recipe of a pre-training: all sections, and which of their values go together."""

from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from lut_ds.config.images import Data
from lut_ds.config.learning import Method, Model
from lut_ds.config.running import Guard, Run
from lut_ds.config.section import Section
from lut_ds.config.training import AdamW, Batches, Optim, Precision, Train
from lut_ds.method.degradations import make_degradation, own_file, rehearse
from lut_ds.method.masking import keep_count


class Recipe(Section):
    """A whole run."""

    model: Model = Field(default_factory=Model)
    method: Method = Field(default_factory=Method)
    data: Data = Field(default_factory=Data)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    precision: Precision = Field(default_factory=Precision)
    guard: Guard = Field(default_factory=Guard)
    run: Run = Field(default_factory=Run)

    @property
    def view_side(self) -> int:
        """Side of the views that are read, pixels: `model.image_size` unless a degradation reads another."""
        degradation = make_degradation(self.method.degradation, self.method.degradation_params)
        side = self.model.image_size
        return side if degradation is None else degradation.view_side(side)

    @property
    def crop(self) -> Literal["resize_crop", "random_resized_crop"]:
        """How views are cut: `data.crop`, or the method's own way."""
        if self.data.crop != "method":
            return self.data.crop
        return "random_resized_crop" if self.method.name == "mae" else "resize_crop"

    def check_views(self) -> None:
        """ValueError unless the degradation exists and its views can be cut; runs and tries one that is in a file of its own."""
        try:
            view_side = self.view_side
            if own_file(self.method.degradation) is not None:
                self._rehearse()
        except ValueError as error:
            raise ValueError(f"method.degradation: {error}") from None
        if self.crop == "resize_crop" and self.data.crop_pad >= view_side:
            side = "model.image_size" if view_side == self.model.image_size else "the degradation's view side"
            raise ValueError(
                f"data.crop_pad {self.data.crop_pad} is not below {side} {view_side}, which reflection needs; lower it"
            )

    def _rehearse(self) -> None:
        degradation = make_degradation(self.method.degradation, self.method.degradation_params)
        assert degradation is not None
        try:
            rehearse(degradation, self.model.image_size, self.model.patch_size)
        except ValueError as error:
            raise ValueError(f"{self.method.degradation}: {error}") from None

    @model_validator(mode="after")
    def _combine(self) -> "Recipe":
        views, patches = self.method.views, self.model.patches
        keep = keep_count(patches, self.method.mask_ratio)
        # A recipe may come out of a checkpoint, whose reading runs nothing: `load_recipe` checks a degradation in a file.
        if own_file(self.method.degradation) is None:
            self.check_views()
        if keep == patches and self.method.degradation == "none":
            raise ValueError(
                f"method.mask_ratio {self.method.mask_ratio:g} leaves nothing to predict; raise it, or set method.degradation, "
                "e.g. to distorted"
            )
        if views == 2 and 0 < self.method.mask_ratio < 0.5:
            raise ValueError(
                f"method.mask_ratio {self.method.mask_ratio} is below 0.5: the two views' visible patches could not be disjoint"
            )
        if keep < 1:
            raise ValueError(
                f"method.mask_ratio {self.method.mask_ratio} leaves no visible patch of {patches}; lower it"
            )
        hidden = int(self.model.width * self.model.mlp_ratio)
        if self.precision.teacher == "fp8" and (self.model.width % 16 or hidden % 16):
            raise ValueError(
                f"precision.teacher fp8 needs model.width and model.width*mlp_ratio divisible by 16, found {self.model.width} and "
                f"{hidden}; change them, or use precision.teacher=bf16"
            )
        if self.optim.warmup_epochs >= self.train.epochs and self.optim.warmup_epochs > 0:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs} is not below train.epochs {self.train.epochs}; change one of them"
            )
        return self


class Reading(Protocol):
    """What the loop reads of a recipe's `data`."""

    @property
    def max_bad_share(self) -> float: ...


class RunRecipe(Protocol):
    """What the engine reads of any recipe, whatever is learned."""

    @property
    def data(self) -> Reading: ...
    @property
    def optim(self) -> AdamW: ...
    @property
    def train(self) -> Batches: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def guard(self) -> Guard: ...
    @property
    def run(self) -> Run: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...
    def model_dump_json(self) -> str: ...
