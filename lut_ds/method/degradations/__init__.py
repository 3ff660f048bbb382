"""Degradations after "Beyond Masking": what else than a mask can be taken from an image for a model to restore.

Wei et al., "Beyond Masking: Demystifying Token-Based Pre-Training for Vision Transformers", 2022. A degradation is one file
of this folder with one `@register`ed class (`base.Degradation`): what the encoder sees, what the target is, where the loss
counts. Files are found by themselves; `method.degradation` takes the names. Any of them goes alone (`method.mask_ratio=0`),
with masking, and with LUT's teacher (`method.name=lut`), which sees the clean views.

What is ours and not the published code's: the encoder is timm's ViT with a cls token and three input channels, the decoder is
MAE's, and random parameters are drawn for each view of each sample instead of once a batch, so that a run resumes exactly
and gives the same on any number of ranks.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lut_ds.method.degradations.base import DEGRADATIONS, Degradation, register

__all__ = ["DEGRADATIONS", "Degradation", "make_degradation", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def make_degradation(name: str, parameters: Mapping[str, Any] | None = None) -> Degradation | None:
    """The degradation of a name with its parameters changed; None for "none".

    Raises:
        ValueError: unknown name or parameter, a value of another type than the default's, or out of its range.
    """
    parameters = dict(parameters or {})
    if name == "none":
        if parameters:
            raise ValueError(f"none takes no parameters, found {', '.join(parameters)}")
        return None
    if name not in DEGRADATIONS:
        close = difflib.get_close_matches(name, DEGRADATIONS, n=1, cutoff=0.5)
        near = f"; did you mean {close[0]}?" if close else f"; expected none, {', '.join(sorted(DEGRADATIONS))}"
        raise ValueError(f"no degradation {name}{near}")
    known = {field.name: type(field.default) for field in fields(DEGRADATIONS[name])}
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(f"{name} has no parameter {key}; expected {', '.join(known)}")
        if not isinstance(value, known[key]) and not (known[key] is float and type(value) is int):
            raise ValueError(f"{name}: {key}: expected a {known[key].__name__}, found {value!r}")
    return DEGRADATIONS[name](**parameters)
