"""What is read, and how views are drawn from it: the section `data`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lut_ds.config.section import Area, Fraction, Positive, Section, Strength


class ImageData(Section):
    """How images are read, in pre-training and in fine-tuning."""

    path: str | None = None
    """Image folder (DIR/train/<class>/*.jpg, DIR/<class>/*.jpg or DIR/*.jpg), folder or pattern of .tar shards, index (.lut),
    list of files (.txt, .lst), or a source of your own: package.module:factory?argument."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip, drawn for each view."""
    crop_scale: tuple[Area, Area] = (0.2, 1.0)
    """Area range of RandomResizedCrop (with `random_resized_crop`, MAE's view)."""
    threads: Positive | None = None
    """Decoding threads of each rank; null: what `lut-ds bench loader --tune` found for this machine, else its cores, at most 8."""
    prefetch: Positive | None = None
    """Micro-batches prepared ahead; null: as tuned, else 2."""
    hw_decoder_load: Fraction | None = None
    """Share of the JPEGs that a GPU's hardware decoder takes, where it has one; null: as tuned, else 0.65."""
    max_bad_share: Fraction = 0.01
    """Stop when more of the samples seen than this, or of 1,000 if that is more, cannot be read or decoded."""
    retry_seconds: Annotated[float, Field(ge=0, le=1200)] = 300.0
    """How long to wait for a data set of which nothing can be read, seconds; the other ranks wait too: stay below guard.hang_seconds."""

    @field_validator("crop_scale")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"expected [smallest, largest], found {list(value)}; swap them")
        return value


class Data(ImageData):
    """What is read, and how views are drawn from it."""

    shuffle: Literal["global", "blocks"] = "global"
    """Order of an epoch: `global` any sample at any time; `blocks` nearly sequential reads, for storage that needs them."""
    shuffle_block: Positive = 256
    """With `blocks`: neighbouring samples that are kept near each other."""
    shuffle_window: Positive = 256
    """With `blocks`: blocks whose samples are shuffled among themselves; batches mix no more than these."""
    crop: Literal["method", "resize_crop", "random_resized_crop"] = "method"
    """How views are cut: `resize_crop` whole, padded and cropped (LUT); `random_resized_crop` (MAE); `method`: as its method does."""
    crop_pad: Annotated[int, Field(ge=0)] = 4
    """Reflect padding before the random crop, pixels (with `resize_crop`)."""
    jitter: tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0, le=0.5)]] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation and hue strengths of view 2."""
    jitter_prob: Fraction = 0.8
    """Probability of the colour jitter of view 2."""
    photometric: bool | Literal["both"] = True
    """Colour jitter and one of gray, solarize and blur on view 2; `both`: on view 1 too, which is also what is reconstructed."""
