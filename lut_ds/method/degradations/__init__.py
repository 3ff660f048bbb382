"""Degradations after "Beyond Masking": what else than a mask can be taken from an image for a model to restore.

Wei et al., "Beyond Masking: Demystifying Token-Based Pre-Training for Vision Transformers", 2022. A degradation is one file
of this folder with one `@register`ed class (`base.Degradation`): what the encoder sees, what the target is, where the loss
counts. Files are found by themselves; `method.degradation` takes the names, or `FILE.py:CLASS` for a file that is anywhere
else (`examples/solarized.py` is one). Any of them goes alone (`method.mask_ratio=0`), with masking, and with LUT's teacher
(`method.name=lut`), which sees the clean views.

What is ours and not the published code's: the encoder is timm's ViT with a cls token and three input channels, the decoder is
MAE's, and random parameters are drawn for each view of each sample instead of once a batch, so that a run resumes exactly
and gives the same on any number of ranks.
"""

import difflib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from inspect import get_annotations, isabstract
from types import ModuleType
from typing import Any

from lut_ds.method.degradations.base import DEGRADATIONS, Degradation, register, rehearse

__all__ = ["DEGRADATIONS", "Degradation", "make_degradation", "own_file", "register", "rehearse"]

_FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)", re.DOTALL)

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
    made = _from_file(name) if own_file(name) is not None else _shipped(name)
    known = {field.name: type(field.default) for field in fields(made)}
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(f"{name} has no parameter {key}; expected {', '.join(known)}")
        if not isinstance(value, known[key]) and not (known[key] is float and type(value) is int):
            raise ValueError(f"{name}: {key}: expected a {known[key].__name__}, found {value!r}")
    return made(**parameters)


def own_file(name: str) -> str | None:
    """Absolute path of the file in a name that is `FILE.py:CLASS`, which `make_degradation` runs; None for another name."""
    named = _FILE.fullmatch(name)
    return os.path.abspath(os.path.expanduser(named["path"])) if named is not None else None


def _shipped(name: str) -> type[Degradation]:
    if name not in DEGRADATIONS:
        close = [] if name.endswith(".py") else difflib.get_close_matches(name, DEGRADATIONS, n=1, cutoff=0.5)
        expected = f"none, {', '.join(sorted(DEGRADATIONS))}, or FILE.py:CLASS"
        raise ValueError(f"no degradation {name}; {f'did you mean {close[0]}?' if close else f'expected {expected}'}")
    return DEGRADATIONS[name]


def _from_file(name: str) -> type[Degradation]:
    path = own_file(name)
    assert path is not None
    try:
        found = getattr(_loaded(path), name.rpartition(":")[2])
    except (ImportError, SyntaxError, AttributeError, NameError, TypeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name}: expected a file and a class in it, found {type(error).__name__}: {reason}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Degradation)) or isabstract(found):
        raise ValueError(
            f"{name}: expected a subclass of lut_ds.method.degradations.Degradation with its degrade, found {found!r}"
        )
    if "__dataclass_fields__" not in vars(found) and get_annotations(found).keys() - {"draws"}:
        raise ValueError(f"{name}: expected @dataclass(frozen=True) above a class with parameters, found none; add it")
    return found


@cache
def _loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"degradation:{path}", path)  # no name that another module has
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there for annotations
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
