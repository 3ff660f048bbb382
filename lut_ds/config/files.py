"""Recipes by name or path: the shipped ones and those of users, with overrides."""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lut_ds.config.parse import S, nearest, parse_sections
from lut_ds.config.recipe import Recipe
from lut_ds.config.values import apply_override, load_yaml
from lut_ds.errors import UserError


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path and apply `section.key=value` overrides.

    A degradation that is `FILE.py:CLASS` is imported here, and in training: not where recipes come out of checkpoints.

    Raises:
        UserError: unknown recipe or key (the nearest valid one is named), wrong type, impossible combination.
    """
    recipe = load_sections(Recipe, name_or_path, overrides, recipe_folder())
    try:
        recipe.check_views()
    except ValueError as error:
        raise UserError(f"recipe {Path(name_or_path).name}: {error}") from error
    return recipe


def load_sections(kind: type[S], name_or_path: str, overrides: Sequence[str], folder: Path) -> S:
    """As `load_recipe`, for any kind of recipe; `folder` holds those that are known by name."""
    path = find_recipe(name_or_path, folder)
    tree = load_yaml(path, "recipe")
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: expected a mapping of sections, found {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return parse_sections(kind, tree, str(path.name))


def find_recipe(name_or_path: str, folder: Path | None = None) -> Path:
    """Path of a recipe given as a file or as the name of a shipped one (in `folder`; None: for pre-training)."""
    folder = recipe_folder() if folder is None else folder
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not os.path.isfile(path):  # False too for names that no file system takes
            raise UserError(f"recipe {path}: no such file; `lut-ds recipes` lists the shipped ones")
        return path
    shipped = folder / f"{name_or_path}.yaml"
    if not os.path.isfile(shipped):
        listed = folder == recipe_folder()
        known = "`lut-ds recipes` lists them" if listed else f"there are {', '.join(_names(folder))}"
        raise UserError(f"recipe {name_or_path}: no such recipe{nearest(name_or_path, _names(folder))}; {known}")
    return shipped


def recipe_folder() -> Path:
    """Folder of the shipped recipes."""
    return Path(str(resources.files("lut_ds"))) / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return _names(recipe_folder())


def _names(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.yaml"))
