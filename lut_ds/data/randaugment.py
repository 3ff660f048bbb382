"""RandAugment as timm applies it (Cubuk et al., 2020), with draws that are a function of (seed, epoch, sample).

The operators are timm's, on PIL images; timm's own `AugmentOp` draws from Python's global generator, which threads share. The
set is that of its `inc1`, whose severity grows with the magnitude.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from lut_ds.data.rng import STREAM_RANDAUGMENT, uniforms

OPERATORS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
    *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
_SIGNED = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}
_LARGEST = 10.0  # magnitude


@dataclass(frozen=True)
class RandAugment:
    """What `rand-m<magnitude>-n<layers>-mstd<std>-p<prob>-inc1` says.

    Attributes:
        magnitude: mean severity, 0 to 10; std: of the normal distribution around it.
        layers: operators an image; prob: that each is applied.
    """

    magnitude: float = 10.0
    std: float = 0.0
    layers: int = 2
    prob: float = 0.5


def parse_randaugment(text: str) -> RandAugment:
    """Read timm's notation, such as `rand-m9-mstd0.5-inc1`; ValueError for anything that is not that set."""
    first, *parts = text.split("-")
    matches = [re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part) for part in parts]
    values = {match[1]: float(match[2]) for match in matches if match}
    whole = all(values.get(key, 1.0).is_integer() for key in ("m", "n"))
    if first != "rand" or not all(matches) or values.get("inc") != 1 or not whole or values.get("m", 0) > _LARGEST:
        raise ValueError(f"expected rand-m<0 to 10>[-n<operators>][-mstd<std>][-p<probability>]-inc1, found {text!r}")
    settings = RandAugment(
        values.get("m", 10.0), values.get("mstd", 0.0), int(values.get("n", 2)), values.get("p", 0.5)
    )
    if settings.layers < 1 or settings.prob > 1 or settings.std > 100:
        raise ValueError(f"expected n of at least 1, p of at most 1 and mstd of at most 100, found {text!r}")
    return settings


def draw_randaugment(
    settings: RandAugment, seed: int, epoch: int, samples: NDArray[np.int64]
) -> list[list[tuple[str, tuple[float, ...]]]]:
    """For each of int64 `samples` [n], the operators that are applied and their arguments, in order."""
    u = uniforms(seed, epoch, samples, STREAM_RANDAUGMENT, 5 * settings.layers).reshape(len(samples), -1, 5)
    normal = np.sqrt(-2 * np.log1p(-u[..., 2])) * np.cos(2 * np.pi * u[..., 3])  # Box and Muller
    levels = np.clip(settings.magnitude + settings.std * normal, 0.0, _LARGEST)
    which = np.floor(u[..., 0] * len(OPERATORS)).astype(int)
    return [
        [
            (OPERATORS[which[i, k]], arguments(OPERATORS[which[i, k]], float(levels[i, k]), bool(u[i, k, 4] > 0.5)))
            for k in range(settings.layers)
            if u[i, k, 1] <= settings.prob
        ]
        for i in range(len(samples))
    ]


def arguments(operator: str, level: float, negate: bool) -> tuple[float, ...]:
    """timm's argument of an operator at a level from 0 to 10."""
    share = level / _LARGEST
    if operator in _SIGNED:
        return (-share * _SIGNED[operator] if negate else share * _SIGNED[operator],)
    if operator in ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"):
        return (max(0.1, 1.0 - share * 0.9 if negate else 1.0 + share * 0.9),)
    whole = {
        "PosterizeIncreasing": 4 - int(share * 4),
        "SolarizeIncreasing": 256 - min(256, int(share * 256)),
        "SolarizeAdd": min(128, int(share * 110)),
    }
    return (whole[operator],) if operator in whole else ()


def apply_randaugment(
    image: NDArray[np.uint8], operators: list[tuple[str, tuple[float, ...]]], fill: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """uint8 [S, S, 3] after the operators; what a rotation or shift uncovers is filled with a colour."""
    if not operators:
        return image
    picture = Image.fromarray(image)
    for name, values in operators:
        if name == "PosterizeIncreasing" and not values[0]:
            picture = Image.new("RGB", picture.size)  # no bits are kept, which Pillow itself refuses
            continue
        picture = NAME_TO_OP[name](picture, *values, fillcolor=fill, resample=Image.Resampling.BICUBIC)
    return np.asarray(picture)
