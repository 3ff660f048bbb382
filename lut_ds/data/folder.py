"""A folder of images as a source, in an order that depends on its names alone."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from lut_ds.data.files import PathTable
from lut_ds.errors import UserError

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff")
_FORMATS = "jpg, jpeg, png, webp, bmp, tif, tiff"


class ImageFolder(PathTable):
    """Images in a folder: DIR/train/<class>/*.jpg, DIR/<class>/*.jpg, or DIR/*.jpg without labels.

    Classes are the sub-folders, sorted; files are sorted by class and relative path, so the same tree is the same source
    on every machine. Names starting with a dot are not looked at. `split` "train" reads DIR/train where that exists and
    DIR itself otherwise; "val" needs DIR/val; None reads DIR as it is. The folder is listed when it is opened; with an index
    (folder_index.py) it is not.
    """

    def __init__(self, path: str | os.PathLike[str], split: Literal["train", "val"] | None = "train") -> None:
        self.root = split_root(Path(path), split)
        folders, images = layout(self.root)
        grouped = [list(_walk(os.fsencode(self.root), name)) for name in folders]
        paths = [p for group in grouped for p in group] or images
        labels = np.repeat(np.arange(len(grouped)), [len(group) for group in grouped])
        classes = [os.fsdecode(name) for name in folders]
        super().__init__(self.root, paths, labels if folders else np.full(len(images), -1), classes)


def split_root(path: Path, split: str | None) -> Path:
    """The folder that holds the split; UserError when it is missing or not a folder."""
    if not path.exists():
        raise UserError(f"data.path: {path}: expected a folder of images, found nothing there; check data.path")
    if not path.is_dir():
        raise UserError(f"data.path: {path}: expected a folder of images, found a file; give the folder that holds it")
    if split is None:
        return path
    inside = path / split
    if split == "train":
        return inside if inside.is_dir() else path
    if not inside.is_dir():
        raise UserError(f"data.path: {path}: expected a sub-folder {split}, found none; add {split}/<class>/*.jpg")
    return inside


def layout(root: Path) -> tuple[list[bytes], list[bytes]]:
    """Names of the class folders, or of the images of a flat folder: one of the two is empty.

    UserError when there are images in both places, or in neither.
    """
    folders, images = listing(os.fsencode(root))
    in_classes = any(next(_walk(os.fsencode(root), name), None) for name in folders)
    if in_classes and images:
        raise UserError(
            f"data.path: {root}: expected images in class folders or a flat folder of images, found both "
            f"(for example {os.fsdecode(images[0])}); move the images beside the class folders away"
        )
    if not in_classes and not images:
        raise UserError(f"data.path: {root}: {_nothing_found(folders, root)}")
    return (folders, []) if in_classes else ([], images)


def listing(folder: bytes) -> tuple[list[bytes], list[bytes]]:
    """Sorted names of the sub-folders and of the image files in `folder` (a dangling link counts as one)."""
    folders: list[bytes] = []
    images: list[bytes] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                target = _target(entry)
                if target == "folder":
                    folders.append(entry.name)
                elif target != "other" and entry.name.lower().endswith(EXTENSIONS):
                    images.append(entry.name)
    except OSError as error:
        raise UserError(
            f"data.path: {os.fsdecode(folder)}: expected a readable folder, found: {error.strerror or error}; "
            "check its permissions"
        ) from error
    return sorted(folders), sorted(images)


def _target(entry: os.DirEntry[bytes]) -> Literal["folder", "file", "nothing", "other"]:
    """What an entry, or the link that it is, leads to; pipes and devices are other: to read them may never end."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    return "nothing" if entry.is_symlink() and not os.path.exists(entry.path) else "other"


def directories(
    root: bytes, relative: bytes, parents: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[bytes, list[bytes]]]:
    """Every folder from `root/relative` down, relative to `root`, with its images; follows links, but not in circles."""
    info = os.stat(os.path.join(root, relative))
    if (info.st_dev, info.st_ino) in parents:
        return
    parents = (*parents, (info.st_dev, info.st_ino))
    folders, images = listing(os.path.join(root, relative))
    yield relative, images
    for name in folders:
        yield from directories(root, os.path.join(relative, name), parents)


def _walk(root: bytes, relative: bytes) -> Iterator[bytes]:
    """Paths, relative to `root`, of all images below `root/relative`."""
    for folder, images in directories(root, relative):
        yield from (os.path.join(folder, name) for name in images)


def _nothing_found(folders: list[bytes], root: Path) -> str:
    if not folders and not any(root.iterdir()):
        return "expected images, found an empty folder; put <class>/*.jpg or train/<class>/*.jpg in it"
    return f"expected images ({_FORMATS}), found none in it or in its {len(folders)} sub-folders; check data.path"
