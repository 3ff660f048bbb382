"""Where encoded images come from: anything with `len`, `read(i)`, `label(i)`, `name(i)` is a source."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lut_ds.errors import RunFault, UserError

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff")
_FORMATS = "jpg, jpeg, png, webp, bmp, tif, tiff"


class Source(Protocol):
    """An indexed set of encoded images. `read` is called from many threads at once."""

    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The encoded image `i`; RunFault naming it when it cannot be read."""
        ...

    def label(self, i: int) -> int:
        """The index into `classes` of image `i`, -1 without one."""
        ...

    def name(self, i: int) -> str:
        """What to call image `i` in a message: for files, the path."""
        ...


class ImageFolder:
    """Images in a folder: DIR/train/<class>/*.jpg, DIR/<class>/*.jpg, or DIR/*.jpg without labels.

    Classes are the sub-folders, sorted; files are sorted by class and relative path, so the same tree is the same source
    on every machine. Names starting with a dot are not looked at. `split` "train" reads DIR/train where that exists and
    DIR itself otherwise; "val" needs DIR/val; None reads DIR as it is. Paths are one blob of bytes with offsets.
    """

    def __init__(self, path: str | os.PathLike[str], split: Literal["train", "val"] | None = "train") -> None:
        self.root = _split_root(Path(path), split)
        folders, images = _listing(os.fsencode(self.root))
        grouped = [(label, list(_walk(os.fsencode(self.root), name))) for label, name in enumerate(folders)]
        in_classes = any(paths for _, paths in grouped)
        if in_classes and images:
            raise UserError(
                f"data.path: {self.root}: expected images in class folders or a flat folder of images, found both "
                f"(for example {os.fsdecode(images[0])}); move the images beside the class folders away"
            )
        if not in_classes and not images:
            raise UserError(f"data.path: {self.root}: {_nothing_found(folders, self.root)}")
        self.classes = [os.fsdecode(name) for name in folders] if in_classes else []
        paths = [p for _, group in grouped for p in group] if in_classes else images
        counts = [len(group) for _, group in grouped]
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts) if in_classes else np.full(len(images), -1)
        self._labels: NDArray[np.int32] = labels.astype(np.int32)
        self._offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum([len(p) for p in paths])]).astype(np.int64)
        self._blob = b"".join(paths)
        self._prefix = os.path.join(os.fsencode(self.root), b"")

    def __len__(self) -> int:
        return len(self._labels)

    def _path(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self._prefix + self._blob[self._offsets[i] : self._offsets[i + 1]]

    def read(self, i: int) -> bytes:
        """The bytes of file `i`; RunFault naming the file when it cannot be read."""
        try:
            with open(self._path(i), "rb", buffering=0) as file:
                return file.readall()
        except OSError as error:
            raise RunFault(f"data: {self.name(i)}: cannot be read: {error.strerror or error}") from error

    def label(self, i: int) -> int:
        """The class index of file `i`, -1 in a flat folder."""
        return int(self._labels[i])

    def name(self, i: int) -> str:
        """The path of file `i`."""
        return os.fsdecode(self._path(i))


def _split_root(path: Path, split: str | None) -> Path:
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


def _listing(folder: bytes) -> tuple[list[bytes], list[bytes]]:
    """Sorted names of the sub-folders and of the image files in `folder` (a dangling link counts as one)."""
    folders: list[bytes] = []
    images: list[bytes] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or entry.is_symlink()):
                    images.append(entry.name)
    except OSError as error:
        raise UserError(
            f"data.path: {os.fsdecode(folder)}: expected a readable folder, found: {error.strerror or error}; "
            "check its permissions"
        ) from error
    return sorted(folders), sorted(images)


def _walk(root: bytes, relative: bytes, parents: tuple[tuple[int, int], ...] = ()) -> Iterator[bytes]:
    """Paths, relative to `root`, of all images below `root/relative`; follows links, but not in circles."""
    info = os.stat(os.path.join(root, relative))
    if (info.st_dev, info.st_ino) in parents:
        return
    parents = (*parents, (info.st_dev, info.st_ino))
    folders, images = _listing(os.path.join(root, relative))
    yield from (os.path.join(relative, name) for name in images)
    for name in folders:
        yield from _walk(root, os.path.join(relative, name), parents)


def _nothing_found(folders: list[bytes], root: Path) -> str:
    if not folders and not any(root.iterdir()):
        return "expected images, found an empty folder; put <class>/*.jpg or train/<class>/*.jpg in it"
    return f"expected images ({_FORMATS}), found none in it or in its {len(folders)} sub-folders; check data.path"
