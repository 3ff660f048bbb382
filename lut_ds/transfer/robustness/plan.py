"""What is measured: the passes that a request means, all of its input checked before any is begun."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lut_ds.errors import UserError
from lut_ds.transfer.models import Pretrained
from lut_ds.transfer.robustness.corruptions import CORRUPTIONS, MEASURED, SEVERITIES, corrupt_batch
from lut_ds.transfer.robustness.measure import Alter, Pass, unaltered
from lut_ds.transfer.robustness.patches import Batch, hide, random_orders, salient_orders, shuffle
from lut_ds.transfer.robustness.sets import FOLDERS, OTHER_IMAGES, find_folder, open_corrupted, open_set, open_val

OF_VAL = ("clean", "c", "occlusion", "shuffle")
SETS = (*OF_VAL, *OTHER_IMAGES)
GRIDS = (2, 4, 7, 14)


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        sets: of SETS; None for those of the validation images and the others that are there.
        folders: where a set is, for those that are not in the data folder under their usual names.
        corruptions: of CORRUPTIONS.
        severities: of 1..5.
        ratios: of patches that are hidden.
        grids: cells along a side that are shuffled; None for those of GRIDS that the image allows.
        limit: images of each set; None for all.
        seed: of corruptions, hidden patches and orders.
    """

    sets: tuple[str, ...] | None = None
    folders: Mapping[str, str] | None = None
    corruptions: tuple[str, ...] = tuple(MEASURED)
    severities: tuple[int, ...] = SEVERITIES
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    grids: tuple[int, ...] | None = None
    limit: int | None = None
    seed: int = 0

    def check(self, data: str) -> tuple[str, ...]:
        """The sets, in the order of SETS; UserError naming what is not known."""
        for option, given, known in (
            ("--sets", self.sets or (), SETS),
            ("--corruptions", self.corruptions, tuple(CORRUPTIONS)),
            ("--severities", self.severities, SEVERITIES),
        ):
            unknown = [item for item in given if item not in known]
            if unknown:
                raise UserError(f"{option}: expected some of {', '.join(map(str, known))}, found {unknown[0]!r}")
        if bad := [ratio for ratio in self.ratios if not 0 < ratio < 1]:
            raise UserError(f"--ratios: expected shares above 0 and below 1, found {bad[0]:g}")
        if self.seed < 0:
            raise UserError(f"--seed: expected a number from 0, found {self.seed}")
        if own := [name for name in self.folders or {} if name in OF_VAL and name != "c"]:
            raise UserError(f"--sets: {own[0]} is made of DATA/val, found a folder for it; name that data with --data")
        if self.sets is not None:
            return tuple(name for name in SETS if name in self.sets)
        folders = self.folders or {}
        return (*OF_VAL, *(name for name in OTHER_IMAGES if find_folder(name, data, folders) is not None))


@dataclass(frozen=True)
class Told:
    """What has to be known of a classifier to plan with it: its encoder, its classes by column (or none), their number."""

    found: Pretrained
    classes: Sequence[str]
    count: int


def plan(wanted: Wanted, data: str, told: Told, workers: Executor) -> list[Pass]:
    """All passes, in the order of SETS; the images as they are come first where anything is done to them.

    Raises:
        UserError: a set that is not there, or has other classes than the classifier, or a grid that does not fit.
    """
    sets = wanted.check(data)
    folder = find_folder("c", data, wanted.folders or {}) if "c" in sets else None
    passes = []
    if {"clean", "occlusion", "shuffle"} & set(sets) or ("c" in sets and folder is None):
        passes += _of_val(wanted, sets if folder is None else tuple(s for s in sets if s != "c"), data, told, workers)
    if folder is not None:
        for name, severity in itertools.product(_names(wanted), wanted.severities):
            images = open_corrupted(folder, name, severity, told.classes, told.count)
            passes += [Pass(f"c/{name}", images, (severity,), unaltered)]
    for name in sets:
        if name in OTHER_IMAGES:
            place = _place(name, wanted, data)
            passes += [Pass(name, open_set(name, place, told.classes, told.count), (0,), unaltered)]
    return passes


def _of_val(wanted: Wanted, sets: Sequence[str], data: str, told: Told, workers: Executor) -> list[Pass]:
    """What is done to the validation images."""
    grids = fitting_grids(wanted.grids, told) if "shuffle" in sets else ()
    val = open_val(data, told.classes, told.count)
    passes = [Pass("clean", val, (0,), unaltered)]
    if "c" in sets:
        passes += [Pass(f"c/{n}", val, wanted.severities, _corrupt(n, wanted.seed, workers)) for n in _names(wanted)]
    if "occlusion" in sets:
        passes += [Pass("occlusion/random", val, wanted.ratios, _hide(told, _at_random(told, wanted.seed)))]
        if told.found.model.cls_token is not None:
            passes += [Pass("occlusion/salient", val, wanted.ratios, _hide(told, _most_salient(told)))]
    if grids:
        passes += [Pass("shuffle", val, grids, _shuffle(wanted.seed))]
    return passes


def _place(name: str, wanted: Wanted, data: str) -> Path:
    place = find_folder(name, data, wanted.folders or {})
    if place is None:
        raise UserError(
            f"--sets: {name}: {data}: expected {' or '.join(FOLDERS[name])} in it, found none; download it, or name it: "
            f"{name}=DIR"
        )
    return place


def fitting_grids(asked: tuple[int, ...] | None, told: Told) -> tuple[int, ...]:
    """Grids whose cells are whole pixels and not smaller than patches."""
    side, patch = told.found.image_size, told.found.record["sizes"]["patch_size"]
    most = side // patch
    bad = [grid for grid in asked or () if side % grid or not 2 <= grid <= most]
    if bad:
        raise UserError(f"--grids: expected divisors of {side} pixels from 2 to {most} patches, found {bad[0]}")
    return asked or tuple(sorted({grid for grid in (*GRIDS, most) if side % grid == 0 and 2 <= grid <= most}))


def _names(wanted: Wanted) -> list[str]:
    return [name for name in CORRUPTIONS if name in wanted.corruptions]


Orders = Callable[[Batch, Sequence[int]], NDArray[np.int64]]
"""Images and their numbers -> the order in which each one's patches are hidden."""


def _corrupt(name: str, seed: int, workers: Executor) -> Alter:
    def alter(pixels: Batch, samples: Sequence[int], values: Sequence[float]) -> Iterator[Batch]:
        for severity in values:
            yield corrupt_batch(pixels, name, int(severity), seed, samples, workers)

    return alter


def _hide(told: Told, orders: Orders) -> Alter:
    patch = told.found.record["sizes"]["patch_size"]

    def alter(pixels: Batch, samples: Sequence[int], values: Sequence[float]) -> Iterator[Batch]:
        order = orders(pixels, samples)
        for ratio in values:
            yield hide(pixels, order, ratio, patch)

    return alter


def _at_random(told: Told, seed: int) -> Orders:
    patches = (told.found.image_size // told.found.record["sizes"]["patch_size"]) ** 2
    return lambda pixels, samples: random_orders(patches, seed, samples)


def _most_salient(told: Told) -> Orders:
    def orders(pixels: Batch, samples: Sequence[int]) -> NDArray[np.int64]:
        device = next(told.found.model.parameters()).device
        return salient_orders(told.found.model, told.found.normalised(torch.from_numpy(pixels).to(device)))

    return orders


def _shuffle(seed: int) -> Alter:
    def alter(pixels: Batch, samples: Sequence[int], values: Sequence[float]) -> Iterator[Batch]:
        for grid in values:
            yield shuffle(pixels, int(grid), seed, samples)

    return alter
