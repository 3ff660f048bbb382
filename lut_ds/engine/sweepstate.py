"""What the folder of a sweep holds already: which runs are trained, and whether they are still what the file says."""

import os
from pathlib import Path
from typing import Any

from lut_ds.config import Recipe
from lut_ds.data.identity import identity
from lut_ds.data.sources import open_source
from lut_ds.engine.manifest import step_folders
from lut_ds.engine.runfolder import check_run_folder, recipe_difference, stored_recipe
from lut_ds.engine.state import read_state
from lut_ds.engine.sweepfile import Entry
from lut_ds.errors import UserError

_ADVICE = "give the run another name in the file, or the sweep another folder"


def complete(recipe: Recipe, step: int, epoch: float) -> bool:
    """Whether a checkpoint of that step and (fractional) epoch is the end of the recipe's run."""
    return epoch >= recipe.train.epochs or step >= (recipe.train.max_steps or step + 1)


def trained(entry: Entry) -> bool:
    """Whether a run's newest checkpoint is its end, as the checkpoint says; its files are not looked at."""
    step, epoch = _progress(entry.folder)
    return complete(entry.recipe, step, epoch)


def check_entry(entry: Entry) -> None:
    """Refuse a folder that does not hold this run, or holds more of it than the recipe asks for; changes nothing.

    A lone run may go on with another teacher's precision; the runs of a sweep are compared, so theirs must not change.

    Raises:
        UserError: what differs, with both values.
    """
    folder, recipe = entry.folder, entry.recipe
    stored = stored_recipe(folder)
    if stored is None:
        check_run_folder(folder, recipe)
        return
    difference = recipe_difference(stored, recipe)
    there, here = _teacher(stored), recipe.precision.teacher
    if difference is None and there not in (None, here):
        difference = f"precision.teacher is {there!r} there and {here!r} here"
    if difference is not None:
        raise UserError(f"{folder} holds a run of another recipe: {difference}; {_ADVICE}")
    step, _ = _progress(folder)
    if step > (recipe.train.max_steps or step):
        raise UserError(
            f"{folder} holds a run of {step} steps: expected at most train.max_steps {recipe.train.max_steps}; {_ADVICE}"
        )


def check_images(entry: Entry, here: dict[str, Any] | None = None) -> str | None:
    """Refuse a run that has begun on other training images than those of its recipe; the same elsewhere are the same.

    Args:
        here: `identity` of the recipe's training images, if it is known.

    Returns:
        The path that it began on, if nothing is there any more: then it cannot be told. None if the images are the same.

    Raises:
        UserError: they differ.
        RunFault: an image that cannot be read.
    """
    stored = stored_recipe(entry.folder) or {}
    began_on, path = (stored.get("data") or {}).get("path"), entry.recipe.data.path
    if began_on is None or path is None or os.path.abspath(began_on) == os.path.abspath(path):
        return None
    try:
        there = identity(open_source(began_on))
    except UserError:
        return str(began_on)
    check_identity(entry, f"its train set ({began_on})", there, here or identity(open_source(path)))
    return None


def check_identity(entry: Entry, origin: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a run on other images.

    Args:
        origin: what to call the set there.

    Raises:
        UserError: how many images there are, there and here.
    """
    if there != here:
        raise UserError(
            f"{entry.folder} holds a run on other images: {origin} has {there['images']} in {there['classes']} classes, that of "
            f"{entry.recipe.data.path} has {here['images']} others in {here['classes']}; name the same data.path, or give the "
            "sweep another folder"
        )


def _teacher(stored: dict[str, Any]) -> Any:
    section = stored.get("precision")
    return section.get("teacher") if isinstance(section, dict) else None


def _progress(folder: Path) -> tuple[int, float]:
    """Step and epoch of the newest checkpoint; zeros without one."""
    for path in step_folders(folder / "checkpoints"):
        try:
            state = read_state(path)
            return int(state["step"]), float(state["epoch"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return 0, 0.0
