"""What the annotation files of each published set say: which image belongs to which class, for training and for evaluation."""

import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lut_ds.errors import UserError


@dataclass(frozen=True)
class Listing:
    """What a set holds.

    Attributes:
        root: where its files are.
        classes: folder names, in the set's own order.
        train, val: (path below `root`, index into `classes`) of every image; `val` is the test set where no labels of
            another are published.
    """

    root: Path
    classes: list[str]
    train: list[tuple[str, int]]
    val: list[tuple[str, int]]


@dataclass(frozen=True)
class Published:
    """A set: how it is read, and how much of it there is."""

    read: Callable[[Path], Listing]
    classes: int
    train: int
    val: int
    layout: str
    """What the folder holds, for people."""


def read_cub(source: Path) -> Listing:
    """CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, images/."""
    root = _root(source, "images.txt", "CUB_200_2011")
    names, paths, labels, splits = (
        _pairs(root / file) for file in ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    order = {number: i for i, number in enumerate(names)}
    for file, found in (("image_class_labels.txt", labels), ("train_test_split.txt", splits)):
        if odd := sorted(set(found) ^ set(paths)):
            raise UserError(
                f"arrange: {root / file}: expected the images of images.txt, found image {odd[0]} in one alone"
            )
    sets: dict[str, list[tuple[str, int]]] = {"1": [], "0": []}
    for number, path in paths.items():
        index = _index(order, labels[number], root / "image_class_labels.txt")
        if splits[number] not in sets:
            raise UserError(f"arrange: {root / 'train_test_split.txt'}: expected 0 or 1, found {splits[number]!r}")
        sets[splits[number]].append((f"images/{path}", index))
    return Listing(root, [_plain(name) for name in names.values()], sets["1"], sets["0"])


def read_cars(source: Path) -> Listing:
    """Stanford Cars: devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, cars_train/, cars_test/."""
    root = _root(source, "devkit/cars_meta.mat", "stanford_cars")
    names = [str(name) for name in _matrix(root / "devkit/cars_meta.mat", "class_names").ravel()]
    test = next(
        (
            root / f
            for f in ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")
            if (root / f).is_file()
        ),
        None,
    )
    if test is None:
        raise UserError(
            f"arrange: {root}: expected cars_test_annos_withlabels.mat, found none (devkit/cars_test_annos.mat has no classes); "
            "download it too"
        )
    order = {str(i + 1): i for i in range(len(names))}
    sets = []
    for file, folder in ((root / "devkit/cars_train_annos.mat", "cars_train"), (test, "cars_test")):
        annotations = _matrix(file, "annotations").ravel()
        if not {"fname", "class"} <= set(annotations.dtype.names or ()):
            raise UserError(
                f"arrange: {file}: expected annotations with fname and class, found {annotations.dtype.names}"
            )
        sets.append([(f"{folder}/{a['fname']}", _index(order, str(int(a["class"])), file)) for a in annotations])
    return Listing(root, _folders(names), *sets)


def read_aircraft(source: Path) -> Listing:
    """FGVC-Aircraft (variants): data/variants.txt, data/images_variant_trainval.txt, data/images_variant_test.txt, data/images/."""
    root = _root(source, "variants.txt", "data", "fgvc-aircraft-2013b/data")
    names = _lines(root / "variants.txt")
    order = {name: i for i, name in enumerate(names)}
    sets = []
    for file in (root / "images_variant_trainval.txt", root / "images_variant_test.txt"):
        rows = _pairs(file)
        sets.append([(f"images/{image}.jpg", _index(order, name, file)) for image, name in rows.items()])
    return Listing(root, _folders(names), *sets)


def read_pets(source: Path) -> Listing:
    """Oxford-IIIT Pets: annotations/trainval.txt, annotations/test.txt, images/; the breed is the image's name."""
    root = _root(source, "annotations/trainval.txt", "oxford-iiit-pet")
    rows = [
        [(name, rest.split()[0], file) for name, rest in _pairs(file).items()]
        for file in (root / "annotations/trainval.txt", root / "annotations/test.txt")
    ]
    names: dict[str, str] = {}
    for image, number, file in rows[0] + rows[1]:
        breed = image.rpartition("_")[0]
        if not number.isdecimal() or names.setdefault(number, breed) != breed:
            raise UserError(
                f"arrange: {file}: {image}: expected the class of {names.get(number, 'a number')}, found {number}"
            )
    order = {number: i for i, number in enumerate(sorted(names, key=int))}
    sets = [[(f"images/{image}.jpg", order[number]) for image, number, _ in part] for part in rows]
    return Listing(root, _folders([names[number] for number in order]), *sets)


def read_inaturalist(year: int) -> Callable[[Path], Listing]:
    """iNaturalist's competition of a year: train{year}.json, val{year}.json, and the images where they say."""

    def read(source: Path) -> Listing:
        root = _root(source, f"train{year}.json")
        found = [_coco(root / f"{split}{year}.json") for split in ("train", "val")]
        if found[0][0] != found[1][0]:
            raise UserError(
                f"arrange: {root / f'val{year}.json'}: expected the categories of train{year}.json, found others"
            )
        names = found[0][0]
        order = {number: i for i, number in enumerate(names)}
        width = len(str(max(names, default=0)))
        folders = [_folder(f"{number:0{width}d}", name) for number, name in names.items()]
        return Listing(root, folders, *([(path, order[number]) for path, number in part] for _, part in found))

    return read


def _coco(path: Path) -> tuple[dict[int, str], list[tuple[str, int]]]:
    """Categories by number, and the path and category of every image, of an annotation file in COCO's format."""
    try:
        content = json.loads(_text(path))
        names = {
            int(one["id"]): str(one["name"]) for one in sorted(content["categories"], key=lambda one: int(one["id"]))
        }
        paths = {one["id"]: str(one["file_name"]) for one in content["images"]}
        images = [(paths[one["image_id"]], int(one["category_id"])) for one in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"arrange: {path}: expected images, annotations and categories, found: {reason[:160]}"
        ) from error
    strange = next((number for _, number in images if number not in names), None)
    if strange is not None:
        raise UserError(f"arrange: {path}: expected one of {len(names)} categories, found {strange}")
    return names, images


def _root(source: Path, needed: str, *inside: str) -> Path:
    """The folder that holds `needed`: the source, or one of those that its archive makes."""
    for root in (source, *(source / name for name in inside)):
        if (root / needed).is_file():
            return root
    raise UserError(
        f"arrange: {source}: expected {needed} in it, found none; give the folder that the archive was unpacked to"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"arrange: {path}: expected a file of the set, found: {error}; download it again") from error


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _text(path).splitlines() if line.strip() and not line.startswith("#")]


def _pairs(path: Path) -> dict[str, str]:
    """First word and the rest of every line."""
    found: dict[str, str] = {}
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if not value or key in found:
            raise UserError(f"arrange: {path}: expected a name and its value once a line, found {line[:60]!r}")
        found[key] = value.strip()
    return found


def _matrix(path: Path, name: str) -> Any:
    """An array of a MATLAB file."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return loadmat(path, squeeze_me=True)[name]
    except (OSError, EOFError, KeyError, ValueError, TypeError, zlib.error, MatReadError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"arrange: {path}: expected a MATLAB file with {name}, found: {reason}; download it again"
        ) from error


def _index(order: dict[str, int], key: str, path: Path) -> int:
    if key not in order:
        raise UserError(f"arrange: {path}: expected one of {len(order)} classes, found {key!r}")
    return order[key]


def _folders(names: Sequence[str]) -> list[str]:
    """Folder names that sort in the set's order."""
    width = len(str(len(names)))
    return [_folder(f"{i + 1:0{width}d}", name) for i, name in enumerate(names)]


def _plain(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.+-]+", "_", name, flags=re.ASCII).strip("_.")[:80]


def _folder(number: str, name: str) -> str:
    plain = _plain(name)
    return number if plain in ("", number, str(int(number))) else f"{number}_{plain}"


def check_path(path: str, root: Path) -> None:
    """UserError for a path of an annotation file that leads out of its set."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise UserError(f"arrange: {root}: expected paths below it in the annotation files, found {path!r}")


SETS = {
    "inaturalist2017": Published(
        read_inaturalist(2017), 5089, 579_184, 95_986, "train2017.json, val2017.json, train_val_images/"
    ),
    "inaturalist2018": Published(
        read_inaturalist(2018), 8142, 437_513, 24_426, "train2018.json, val2018.json, train_val2018/"
    ),
    "inaturalist2019": Published(
        read_inaturalist(2019), 1010, 265_213, 3030, "train2019.json, val2019.json, train_val2019/"
    ),
    "cub200": Published(
        read_cub,
        200,
        5994,
        5794,
        "CUB_200_2011/ with images.txt, classes.txt, image_class_labels.txt, train_test_split.txt, images/",
    ),
    "cars": Published(read_cars, 196, 8144, 8041, "devkit/, cars_test_annos_withlabels.mat, cars_train/, cars_test/"),
    "aircraft": Published(
        read_aircraft,
        100,
        6667,
        3333,
        "fgvc-aircraft-2013b/data/ with variants.txt, images_variant_trainval.txt, images_variant_test.txt, images/",
    ),
    "pets": Published(read_pets, 37, 3680, 3669, "annotations/trainval.txt, annotations/test.txt, images/"),
}
