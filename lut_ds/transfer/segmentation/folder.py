"""Images with masks in ADE20K's folders, and what is checked of them before anything is trained."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lut_ds.data.folder import EXTENSIONS
from lut_ds.data.progress import progress_bar
from lut_ds.errors import RunFault, UserError

IGNORED = 255  # of a mask: no class
_FOLDERS = {"train": "training", "val": "validation"}
_LABELS = ("L", "P", "1", "I", "I;16")  # modes of PIL with one number a pixel
_NAMES = ("objectInfo150.txt", "classes.txt")

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Labels:
    """What mask values mean: `classes` of them; with `reduce_zero` value 0 is no class and 1 is the first."""

    classes: int
    reduce_zero: bool

    @property
    def largest(self) -> int:
        """Of the values that are a class."""
        return self.classes if self.reduce_zero else self.classes - 1

    def strange(self, mask: NDArray[np.int64]) -> int | None:
        """A value in the mask that is none, or None."""
        outside = (mask < 0) | ((mask > self.largest) & (mask != IGNORED))
        return int(mask[outside][0]) if outside.any() else None

    def read(self, mask: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Classes from 0, and IGNORED."""
        if not self.reduce_zero:
            return mask.astype(np.uint8)
        return np.where((mask == 0) | (mask == IGNORED), IGNORED, mask - 1).astype(np.uint8)


class MaskedImages:
    """Images of DIR/images/{training,validation}/ in sorted order, each with DIR/annotations/.../<same name>.png.

    It is a `Source` of the images, without labels of whole images.

    Raises:
        UserError: a missing or empty folder, an image without a mask, or a mask without an image.
    """

    def __init__(self, root: str | os.PathLike[str], split: Split, labels: Labels) -> None:
        self.root, self.split, self.labels = Path(root), split, labels
        name = _FOLDERS[split]
        extensions = {extension.decode() for extension in EXTENSIONS}
        images = _listed(self.root / "images" / name, extensions)
        masks = _listed(self.root / "annotations" / name, {".png"})
        _check_pairs(images, masks)
        self._images = [path for _, path in sorted(images.items())]
        self._masks = [masks[stem] for stem in sorted(images)]
        self.classes: list[str] = []
        self.labelled = False  # whether `check` saw a pixel of a class

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        """Path of image `i`."""
        return str(self._images[i])

    def label(self, i: int) -> int:
        """-1: an image has no class."""
        return -1

    def read(self, i: int) -> bytes:
        """The encoded image `i`; RunFault naming it when it cannot be read."""
        try:
            return self._images[i].read_bytes()
        except OSError as error:
            raise RunFault(f"data: {self._images[i]}: cannot be read: {error.strerror or error}") from error

    def load(self, i: int) -> tuple[Image.Image, Image.Image]:
        """Image (RGB) and mask (L: classes from 0, and 255) of the same size, decoded; threads may call it together.

        Raises:
            RunFault: either cannot be decoded, they differ in size, or the mask has a value that is none.
        """
        try:
            with Image.open(self._images[i]) as image:
                picture = image.convert("RGB")
            mask = read_mask(self._masks[i])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise RunFault(f"data: {self._images[i]} or its mask cannot be decoded: {error}") from error
        problem = self._problem(i, picture.size, mask)
        if problem is not None:
            raise RunFault(f"data: {problem}")
        return picture, Image.fromarray(self.labels.read(mask))

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image `i`, from its header; UserError when it has none."""
        try:
            with Image.open(self._images[i]) as image:
                return image.height, image.width
        except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(
                f"data: {self._images[i]}: expected an image, found: {error}; repair or remove it"
            ) from error

    def check(self, indices: Iterable[int], threads: int) -> dict[int, tuple[int, int]]:
        """Headers of images and values of masks; sizes (height, width) by index.

        Raises:
            UserError: naming the first image or mask, in the order given, that cannot be used.
        """
        indices = list(indices)
        found = {}
        with ThreadPoolExecutor(threads) as pool, progress_bar(f"checking masks of {self.split}", len(indices)) as bar:
            for i, size in zip(indices, pool.map(self._check, indices)):
                found[i] = size
                bar.update()
        return found

    def _check(self, i: int) -> tuple[int, int]:
        height, width = self.size(i)
        try:
            mask = read_mask(self._masks[i])
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"data: {self._masks[i]}: expected a mask, found: {error}; repair or remove it") from error
        problem = self._problem(i, (width, height), mask)
        if problem is not None:
            raise UserError(f"data: {problem}; correct the mask, data.classes or data.reduce_zero_label")
        if not self.labelled and (self.labels.read(mask) != IGNORED).any():
            self.labelled = True
        return height, width

    def _problem(self, i: int, size: tuple[int, int], mask: NDArray[np.int64]) -> str | None:
        """What is wrong with a mask of an image of `size` (width, height)."""
        if mask.shape != size[::-1]:
            found = f"{mask.shape[1]}x{mask.shape[0]}"
            return f"{self._masks[i]}: expected the {size[0]}x{size[1]} pixels of its image, found {found}"
        value = self.labels.strange(mask)
        if value is None:
            return None
        return f"{self._masks[i]}: expected values from 0 to {self.labels.largest}, or 255, found {value}"


def read_mask(path: Path) -> NDArray[np.int64]:
    """Values of a mask [H, W]; ValueError for a picture with several numbers a pixel, OSError for one that is damaged."""
    with Image.open(path) as image:
        if image.mode not in _LABELS:
            raise ValueError(f"a picture of mode {image.mode}, where one number a pixel is expected")
        return np.asarray(image).astype(np.int64)


def class_names(root: Path, classes: int) -> list[str]:
    """Names from ADE20K's objectInfo150.txt or a classes.txt (a line each) in the folder, else the numbers.

    Raises:
        UserError: a file with another number of names.
    """
    for file in (root / name for name in _NAMES):
        if file.is_file():
            lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
            if file.name == _NAMES[0]:
                lines = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]
            if len(lines) != classes:
                raise UserError(
                    f"data.classes: {file}: expected {classes} names, found {len(lines)}; set data.classes={len(lines)}, "
                    "or remove the file"
                )
            return lines
    return [str(i) for i in range(classes)]


def _listed(folder: Path, extensions: set[str]) -> dict[str, Path]:
    """Files of a folder by name without extension."""
    if not folder.is_dir():
        raise UserError(
            f"data.path: {folder}: expected a folder, found none; data.path needs images/training, annotations/training, "
            "images/validation and annotations/validation"
        )
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in extensions and path.name[0] != "."]
    if not files:
        raise UserError(f"data.path: {folder}: expected {', '.join(sorted(extensions))} files, found none; add them")
    found: dict[str, Path] = {}
    for path in files:
        if path.stem in found:
            raise UserError(f"data.path: {path}: has the name of {found[path.stem].name}; rename one of the two")
        found[path.stem] = path
    return found


def _check_pairs(images: dict[str, Path], masks: dict[str, Path]) -> None:
    without = sorted(set(images) - set(masks))
    if without:
        raise UserError(
            f"data.path: {images[without[0]]}: expected a mask {without[0]}.png in annotations/, found none "
            f"({len(without)} images without); add them, or remove the images"
        )
    alone = sorted(set(masks) - set(images))
    if alone:
        raise UserError(
            f"data.path: {masks[alone[0]]}: a mask without an image ({len(alone)} of them); add the images, or remove the masks"
        )
