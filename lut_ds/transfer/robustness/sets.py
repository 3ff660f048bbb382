"""The sets of images that a classifier is tested on: where they lie, what their folders mean, which logits count.

Names of folders are those of the downloads:
    a         imagenet-a/<wnid>                    200 classes, logits of those alone (Hendrycks et al. 2021)
    r         imagenet-r/<wnid>                    200 classes, logits of those alone (Hendrycks et al. 2021)
    sketch    sketch/<wnid>                        1000 classes (Wang et al. 2019)
    v2        imagenetv2-*/<0..999>                1000 classes by number (Recht et al. 2019)
    objectnet objectnet-1.0/{images,mappings}      113 classes that ImageNet has too, logits of those alone (Barbu et al. 2019)
    c         imagenet-c/<corruption>/<1..5>/<wnid>, or in blur/, digital/, noise/, weather/, extra/ as its archives have it
ObjectNet's own script counts a prediction outside of the 113 classes as wrong, and so gives lower numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.sources import ImageFolder, Source, open_source
from lut_ds.errors import UserError
from lut_ds.transfer.labelled import check_labels, labels_of
from lut_ds.transfer.robustness.classes import Groups, grouped, imagenet_columns, one_each, synsets
from lut_ds.transfer.robustness.objectnet import WithoutBorder, folder_classes

FOLDERS: dict[str, tuple[str, ...]] = {
    "a": ("imagenet-a",),
    "r": ("imagenet-r",),
    "sketch": ("sketch", "imagenet-sketch"),
    "v2": (
        "imagenetv2-matched-frequency-format-val",
        "imagenetv2-matched-frequency",
        "imagenetv2",
        "imagenet-v2",
    ),
    "objectnet": ("objectnet-1.0", "objectnet"),
    "c": ("imagenet-c",),
}
OTHER_IMAGES = ("a", "r", "sketch", "v2", "objectnet")


@dataclass(frozen=True)
class ImageSet:
    """Images to classify.

    Attributes:
        name: of the set.
        source: its images.
        targets: row of `groups` that is right for each image, int64 [N]; -1 for images that are not classified.
        groups: the classes that are told apart.
        crop: as `EvalLoader`'s; None for the classifier's own.
    """

    name: str
    source: Source
    targets: NDArray[np.int64]
    groups: Groups
    crop: float | None = None

    def indices(self, limit: int | None) -> NDArray[np.int64]:
        """The images that are classified; with a limit so many of them, spread evenly over the set."""
        every = np.flatnonzero(self.targets >= 0)
        if limit is None or limit >= len(every):
            return every
        return every[np.arange(limit) * len(every) // limit]


def find_folder(name: str, data: str, given: Mapping[str, str]) -> Path | None:
    """Where a set is: the folder given for it, or one of its usual names in the data folder; None where there is none."""
    if name in given:
        return Path(given[name])
    return next((p for folder in FOLDERS[name] if (p := Path(data) / folder).is_dir()), None)


def open_set(name: str, folder: Path, classes: Sequence[str], count: int) -> ImageSet:
    """One of OTHER_IMAGES.

    Args:
        classes, count: of the classifier (see `imagenet_columns`).

    Raises:
        UserError: a classifier or a folder with other classes.
    """
    columns = imagenet_columns(classes, count, name)
    if name == "objectnet":
        return _objectnet(folder, columns)
    known = synsets(name) if name in ("a", "r") else synsets()
    names = [str(i) for i in range(len(known))] if name == "v2" else list(known)
    source = _folder(name, folder)
    _check_names(name, folder, source.classes, names)
    row = {folder_name: i for i, folder_name in enumerate(names)}
    rows = np.array([row[folder_name] for folder_name in source.classes])
    return ImageSet(name, source, rows[labels_of(source)], one_each([columns[wnid] for wnid in known]))


def _objectnet(folder: Path, columns: Mapping[str, int]) -> ImageSet:
    shared = folder_classes(folder)
    source = _folder("objectnet", folder / "images")
    absent = sorted(set(shared) - set(source.classes))
    if absent:
        raise _other_classes("objectnet", folder / "images", len(shared), absent, [])
    row = {name: i for i, name in enumerate(shared)}
    rows = np.array([row.get(name, -1) for name in source.classes])
    groups = grouped([[columns[synsets()[i]] for i in group] for group in shared.values()])
    return ImageSet("objectnet", WithoutBorder(source), rows[labels_of(source)], groups)


def open_val(data: str, classes: Sequence[str], count: int) -> ImageSet:
    """The validation images, DATA/val: what is corrupted, occluded and shuffled.

    Raises:
        UserError: no validation images with labels, or other classes than the classifier's.
    """
    source = open_source(data, "val")
    return ImageSet("clean", source, *_as_classifier(source, f"{data}: val", classes, count))


def open_corrupted(folder: Path, corruption: str, severity: int, classes: Sequence[str], count: int) -> ImageSet:
    """A corruption and severity of ImageNet-C as downloaded, whose images are crops already.

    Raises:
        UserError: it is not there, or has other classes than the classifier.
    """
    places = [folder / corruption, *sorted(folder.glob(f"*/{corruption}"))]
    found = next((p / str(severity) for p in places if (p / str(severity)).is_dir()), None)
    if found is None:
        raise UserError(
            f"--sets: c: {folder}: expected {corruption}/{severity} in it, found none; unpack that archive of ImageNet-C, "
            "or leave it out with --corruptions or --severities"
        )
    source = _folder("c", found)
    return ImageSet("c", source, *_as_classifier(source, str(found), classes, count), crop=1.0)


def _as_classifier(source: Source, where: str, classes: Sequence[str], count: int) -> tuple[NDArray[np.int64], Groups]:
    """Targets and groups of a set that has the classifier's own classes."""
    names = list(source.classes)
    if not names:
        raise UserError(f"data: {where}: expected images in class folders, found no labels; give <class>/*.jpg")
    if len(names) != count:
        raise UserError(
            f"data: {where}: expected the {count} classes of the checkpoint, found {len(names)}; "
            "give the data that it was trained for, or another checkpoint"
        )
    check_labels(labels_of(source), source, where)
    # A classifier that does not name its classes has them in the order of the folders, ImageNet's by WordNet id.
    told = list(classes) or (list(synsets()) if set(names) == set(synsets()) else names)
    strange = sorted(set(names) - set(told))
    if strange:
        raise UserError(
            f"data: {where}: expected the classes of the checkpoint ({told[0]!r}...), found {strange[0]!r} "
            f"({len(strange)} unknown); give the data that it was trained for"
        )
    column = {name: i for i, name in enumerate(told)}
    return labels_of(source), one_each([column[name] for name in names])


def _folder(name: str, folder: Path) -> Source:
    if not folder.is_dir():
        raise UserError(
            f"--sets: {name}: {folder}: expected the folder of this set, found none; download it, or name it: {name}=DIR"
        )
    return ImageFolder(folder, None)


def _check_names(name: str, folder: Path, found: Sequence[str], expected: Sequence[str]) -> None:
    absent, strange = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if absent or strange:
        raise _other_classes(name, folder, len(expected), absent, strange)


def _other_classes(name: str, folder: Path, count: int, absent: Sequence[str], strange: Sequence[str]) -> UserError:
    problem = f"none of {absent[0]!r}" if absent else f"also {strange[0]!r}"
    return UserError(
        f"--sets: {name}: {folder}: expected its {count} class folders, found {problem} ({len(absent)} missing, "
        f"{len(strange)} unknown); download the set again, or name its folder: {name}=DIR"
    )
