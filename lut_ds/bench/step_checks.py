"""What `lut-ds bench step` refuses before anything runs: sizes that do not fit, work that is not the same on all sides."""

import os
from collections.abc import Sequence
from pathlib import Path

from lut_ds.config import Recipe
from lut_ds.engine.reading import open_source
from lut_ds.engine.step import check_batch_norm, split_batch
from lut_ds.errors import UserError


def check_sizes(recipe: Recipe, world_size: int) -> None:
    """Refuse what a run of the recipe would refuse: batches that do not divide, batch norm over one image, no data.

    Raises:
        UserError: what does not fit.
    """
    micro_batch, _ = split_batch(recipe.train.global_batch, recipe.train.micro_batch, world_size)
    check_batch_norm(recipe, micro_batch * world_size)
    if recipe.data.path is not None:
        images = len(open_source(recipe))
        if images < recipe.train.global_batch:
            raise UserError(
                f"data.path {recipe.data.path}: expected at least the {recipe.train.global_batch} images of a step, found "
                f"{images}; lower --batch or add images"
            )


def check_same_work(recipe: Recipe, peers: Sequence[str], expert: bool) -> None:
    """Refuse to put sides beside ours that would compute something else.

    Args:
        recipe: of ours.
        peers: published implementations by name.
        expert: whether the plain-PyTorch baseline runs too.

    Raises:
        UserError: which setting the others do not know.
    """
    method = recipe.method
    for peer in peers:
        if peer != method.name:
            raise UserError(
                f"--peer-{peer}: the recipe trains {method.name}, which is other work than the published {peer}'s; take a "
                f"{peer} recipe, or leave --peer-{peer} out"
            )
    others = [f"--peer-{peer}" for peer in peers] + ["--peers"] * expert
    if not others:
        return
    known: dict[str, str | int] = {"degradation": "none", "head_norm": "bn", "head_act": "relu"}
    if method.name == "lut" and expert:
        known |= {"projector_depth": 2, "predictor_depth": 2}
    for key, value in known.items():
        if getattr(method, key) != value and (method.name == "lut" or key == "degradation"):
            raise UserError(
                f"{others[0]}: expected method.{key}={value}, which is all that side knows, found {getattr(method, key)}; leave "
                f"{' and '.join(others)} out"
            )


def check_trace(file: str) -> None:
    """Refuse a trace that could not be written; UserError names the file."""
    path = Path(file).expanduser().absolute()
    folder = next(parent for parent in path.parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"--trace {file}: expected a file that can be written, e.g. --trace runs/trace.json")
