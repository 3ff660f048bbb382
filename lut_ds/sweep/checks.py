"""What `lut-ds sweep` refuses before anything is trained, and what it learns of the data on the way."""

import os
from collections.abc import Callable
from typing import Any

from lut_ds.data.identity import identity
from lut_ds.engine.step import check_batch_norm, split_batch
from lut_ds.engine.sweepfile import Entry, SweepFile
from lut_ds.engine.sweepstate import check_entry, check_identity, check_images, trained
from lut_ds.errors import UserError
from lut_ds.sweep.measure import KS, stored_record
from lut_ds.transfer.labelled import open_labelled

Data = dict[str, dict[str, Any]]  # `identity` of train and val


def check_alone() -> None:
    """UserError unless this process is the only one: it starts those of the runs itself."""
    ranks = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    if ranks != "1":
        raise UserError(f"sweep: expected one process, found {ranks} ranks; start it without a launcher, see --jobs")


def check_sweep(sweep: SweepFile, say: Callable[[str], None]) -> dict[str, Data]:
    """Refuse what would fail later, and runs that are not those of the file any more; changes nothing.

    Args:
        say: takes a line about what cannot be told.

    Returns:
        By `data.path`, what its images are.

    Raises:
        UserError: the run, what was expected there, and what was found.
        RunFault: an image that cannot be read.
    """
    data: dict[str, Data] = {}
    gone: dict[tuple[str, str | None], list[str]] = {}  # runs, by the path that they began on and that of now
    for entry in sweep.entries:
        try:
            found = _data(entry, data)
            check_entry(entry)
            if not trained(entry):
                _check_trainable(entry, found["train"]["images"])
            began_on = _check_data(entry, found)
        except UserError as error:
            raise UserError(f"sweep {sweep.path}: runs.{entry.name}: {error}") from None
        if began_on is not None:
            gone.setdefault((began_on, entry.recipe.data.path), []).append(entry.title)
    for (began_on, path), titles in gone.items():
        who = titles[0] if len(titles) == 1 else f"{len(titles)} runs"
        say(f"{who}: began on {began_on}, where there are no images now; taken to be those of {path}")
    return data


def _data(entry: Entry, known: dict[str, Data]) -> Data:
    path = entry.recipe.data.path
    if path is None:
        raise UserError("data.path: no image folder given; add data.path=DIR with train/<class>/ and val/<class>/")
    if path not in known:
        train, val = open_labelled(path)
        if len(train) < max(KS):
            raise UserError(f"data.path: {path}: expected at least {max(KS)} training images, found {len(train)}")
        known[path] = {"train": identity(train), "val": identity(val)}
    return known[path]


def _check_trainable(entry: Entry, images: int) -> None:
    recipe = entry.recipe
    if images < recipe.train.global_batch:
        raise UserError(
            f"data.path: {recipe.data.path}: expected at least {recipe.train.global_batch} training images, found {images}"
        )
    micro_batch, _ = split_batch(recipe.train.global_batch, recipe.train.micro_batch, 1)
    check_batch_norm(recipe, micro_batch)


def _check_data(entry: Entry, here: Data) -> str | None:
    """Refuse a run of other images: one that was evaluated says of which, one that has begun on which path.

    Returns:
        That path, where it cannot be told any more.
    """
    there = (stored_record(entry) or {}).get("data")
    if not isinstance(there, dict) or there.keys() != here.keys():
        return check_images(entry, here["train"])
    for split in here:
        check_identity(entry, f"its {split} set", there[split], here[split])
    return None
