"""From a tree of values to typed sections, or to one line that says what is wrong and what was meant."""

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from lut_ds.config.recipe import Recipe
from lut_ds.config.section import Section
from lut_ds.config.values import coerce
from lut_ds.errors import UserError

S = TypeVar("S", bound=Section)


def parse_recipe(tree: dict[str, Any], origin: str) -> Recipe:
    """Validate a recipe tree; `origin` names it in errors."""
    return parse_sections(Recipe, tree, origin)


def parse_sections(kind: type[S], tree: dict[str, Any], origin: str) -> S:
    """As `parse_recipe`, for any kind of recipe."""
    try:
        return kind.model_validate(coerce(tree))
    except RecursionError:
        raise UserError(f"recipe {origin}: contains itself, or is nested too deeply; write it flat") from None
    except ValidationError as error:
        raise UserError(f"recipe {origin}: {_describe(kind, error.errors()[0])}") from None


def recipe_keys(kind: type[Section] = Recipe) -> list[str]:
    """Every valid `section.key`."""
    sections = {name: field.annotation for name, field in kind.model_fields.items()}
    return [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]  # type: ignore[union-attr]


def _describe(kind: type[Section], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("bool", "int", "float"))
    found = error.get("input")
    if error["type"] == "extra_forbidden":
        sections = {name: field.annotation.model_fields for name, field in kind.model_fields.items()}  # type: ignore[union-attr]
        owners = [name for name, fields in sections.items() if isinstance(found, dict) and set(found) <= set(fields)]
        candidates = recipe_keys(kind) if "." in where else owners or list(sections)
        return f"unknown key {where}{nearest(where, candidates)}"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}" if where else str(error["ctx"]["error"])
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, found {found!r}"


def nearest(name: str, candidates: Sequence[str]) -> str:
    """`; did you mean X?` with the likeliest of `candidates`, or nothing."""
    section, _, key = name.rpartition(".")
    close = [c for c in candidates if section and c.rpartition(".")[2] == key][:1]  # a right key in a wrong section
    if not close:
        close = difflib.get_close_matches(name.lower(), candidates, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
