"""Miniatures of the published sets, in their own layouts: two classes, three training and two test images."""

import json
from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.data.images import encode, photo

COUNTS = {"train": 3, "val": 2}


def _image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(photo(24, 28, seed)))


def _text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def cub(root: Path) -> Path:
    folder = root / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    images = [(f"{names[i % 2]}/bird_{i}.jpg", i % 2) for i in range(5)]
    _text(folder / "classes.txt", *(f"{i + 1} {name}" for i, name in enumerate(names)))
    _text(folder / "images.txt", *(f"{i + 1} {path}" for i, (path, _) in enumerate(images)))
    _text(folder / "image_class_labels.txt", *(f"{i + 1} {label + 1}" for i, (_, label) in enumerate(images)))
    _text(folder / "train_test_split.txt", *(f"{i + 1} {int(i < 3)}" for i in range(5)))
    for i, (path, _) in enumerate(images):
        _image(folder / "images" / path, i)
    return root


def cars(root: Path) -> Path:
    names = np.array(["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"], dtype=object)
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    kind = [("bbox_x1", object), ("class", object), ("fname", object)]
    for file, folder, labels in (
        ("devkit/cars_train_annos.mat", "cars_train", [1, 2, 1]),
        ("cars_test_annos_withlabels.mat", "cars_test", [2, 1]),
    ):
        rows = [(3, label, f"{i + 1:05d}.jpg") for i, label in enumerate(labels)]
        savemat(root / file, {"annotations": np.array(rows, dtype=kind)})
        for i in range(len(labels)):
            _image(root / folder / f"{i + 1:05d}.jpg", i)
    return root


def aircraft(root: Path) -> Path:
    data = root / "fgvc-aircraft-2013b" / "data"
    _text(data / "variants.txt", "707-320", "F-16A/B")
    _text(data / "images_variant_trainval.txt", "1025794 707-320", "0000002 F-16A/B", "0000003 707-320")
    _text(data / "images_variant_test.txt", "0000004 F-16A/B", "0000005 707-320")
    for i, name in enumerate(("1025794", "0000002", "0000003", "0000004", "0000005")):
        _image(data / "images" / f"{name}.jpg", i)
    return root


def pets(root: Path) -> Path:
    annotations = root / "annotations"
    _text(
        annotations / "trainval.txt",
        "# a comment",
        "Abyssinian_1 1 1 1",
        "great_pyrenees_2 2 2 1",
        "Abyssinian_3 1 1 1",
    )
    _text(annotations / "test.txt", "Abyssinian_4 1 1 1", "great_pyrenees_5 2 2 1")
    for i, name in enumerate(("Abyssinian_1", "great_pyrenees_2", "Abyssinian_3", "Abyssinian_4", "great_pyrenees_5")):
        _image(root / "images" / f"{name}.jpg", i)
    return root


def inaturalist(root: Path, year: int = 2018) -> Path:
    folder = {2017: "train_val_images", 2018: "train_val2018", 2019: "train_val2019"}[year]
    categories = [{"id": 0, "name": "Ficus carica"}, {"id": 11, "name": "11"}]
    number = 0
    for split, labels in (("train", [0, 11, 0]), ("val", [11, 0])):
        images, annotations = [], []
        for label in labels:
            number += 1
            path = f"{folder}/Plantae/{label}/{number:032x}.jpg"
            _image(root / path, number)
            images.append({"id": number, "file_name": path})
            annotations.append({"id": number, "image_id": number, "category_id": label})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return root


MINIATURES = {
    "cub200": (cub, ["001.Black_footed_Albatross", "002.Laysan_Albatross"]),
    "cars": (cars, ["1_AM_General_Hummer_SUV_2000", "2_Ram_C_V_Cargo_Van_Minivan_2012"]),
    "aircraft": (aircraft, ["1_707-320", "2_F-16A_B"]),
    "pets": (pets, ["1_Abyssinian", "2_great_pyrenees"]),
    "inaturalist2017": (lambda root: inaturalist(root, 2017), ["00_Ficus_carica", "11"]),
    "inaturalist2018": (inaturalist, ["00_Ficus_carica", "11"]),
    "inaturalist2019": (lambda root: inaturalist(root, 2019), ["00_Ficus_carica", "11"]),
}
