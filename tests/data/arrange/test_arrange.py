"""Every published layout becomes class folders; what is missing or disagrees is one line; nothing is overwritten."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lut_ds.data.arrange.arrange import arrange, describe
from lut_ds.data.arrange.layouts import SETS
from lut_ds.data.folder import ImageFolder
from lut_ds.errors import UserError
from tests.data.arrange.sets import COUNTS, MINIATURES, aircraft, cars, cub, inaturalist, pets


def small(name: str, source: Path, dest: Path, **options: Any) -> dict[str, Any]:
    return arrange(name, source, dest, **{"subset": True, **options})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.jpg"))}


@pytest.mark.parametrize("name", sorted(SETS))
def test_layouts_become_class_folders(name: str, tmp_path: Path) -> None:
    make, classes = MINIATURES[name]
    source = make(tmp_path / "source")
    before = tree(source)
    result = small(name, source, tmp_path / "dest")
    assert (result["train"], result["val"], result["classes"], result["complete"]) == (3, 2, 2, True)
    assert (result["smallest"], result["largest"], result["left_out"]) == (1, 2, 0)
    for split, count in COUNTS.items():
        images = ImageFolder(tmp_path / "dest", split)  # type: ignore[arg-type]
        assert (len(images), images.classes) == (count, classes)
        assert sorted(images.label(i) for i in range(count)) == ([0, 0, 1] if split == "train" else [0, 1])
    assert set(tree(tmp_path / "dest").values()) == set(before.values())
    assert tree(source) == before


def test_labels_are_the_annotation_files(tmp_path: Path) -> None:
    small("cars", cars(tmp_path / "cars"), tmp_path / "a")
    assert (tmp_path / "a/train/2_Ram_C_V_Cargo_Van_Minivan_2012/00002.jpg").is_symlink()
    assert (tmp_path / "a/val/2_Ram_C_V_Cargo_Van_Minivan_2012/00001.jpg").is_symlink()
    small("aircraft", aircraft(tmp_path / "air"), tmp_path / "b")
    assert (tmp_path / "b/val/2_F-16A_B/0000004.jpg").is_symlink()


@pytest.mark.parametrize("how", ["symlink", "hardlink", "copy"])
def test_interrupted_it_goes_on(how: Any, tmp_path: Path) -> None:
    source, dest = pets(tmp_path / "source"), tmp_path / "dest"
    asked = iter([False, False, True])
    first = small("pets", source, dest, how=how, stopped=lambda: next(asked))
    assert (first["made"], first["complete"]) == (2, False)
    assert "the same command goes on" in describe(first)
    (dest / "train/1_Abyssinian/.Abyssinian_3.jpg.partial").write_bytes(b"what a killed process left")
    second = small("pets", source, dest, how=how)
    assert (second["made"], second["there"], second["complete"]) == (3, 2, True)
    third = small("pets", source, dest, how=how)
    assert (third["made"], third["there"]) == (0, 5)
    one = dest / "train/1_Abyssinian/Abyssinian_1.jpg"
    original = source / "images/Abyssinian_1.jpg"
    assert one.is_symlink() == (how == "symlink")
    assert one.samefile(original) == (how != "copy")
    assert one.read_bytes() == original.read_bytes()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source, dest = pets(tmp_path / "source"), tmp_path / "dest"
    small("pets", source, dest, how="copy")
    mine = dest / "train/1_Abyssinian/Abyssinian_1.jpg"
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match="nothing is overwritten"):
        small("pets", source, dest, how="copy")
    assert mine.read_bytes() == b"mine"
    shutil.copy(mine, dest / "train/1_Abyssinian/extra.jpg")
    with pytest.raises(UserError, match=r"extra\.jpg: expected images of the set alone"):
        small("pets", source, dest, how="copy")
    with pytest.raises(UserError, match="expected an arrangement of"):
        small("pets", source, dest, how="symlink")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="missing or empty folder"):
        small("pets", source, tmp_path / "other")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def without_category(root: Path) -> None:
    path = root / "val2018.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 99
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name,make,change,words",
    [
        (
            "cub200",
            cub,
            lambda r: (r / "CUB_200_2011/images/001.Black_footed_Albatross/bird_0.jpg").unlink(),
            "1 missing",
        ),
        (
            "cub200",
            cub,
            lambda r: (r / "CUB_200_2011/classes.txt").unlink(),
            r"classes\.txt: expected a file of the set",
        ),
        (
            "cub200",
            cub,
            lambda r: edit(r / "CUB_200_2011/image_class_labels.txt", "3 1\n", ""),
            "found image 3 in one alone",
        ),
        (
            "cub200",
            cub,
            lambda r: edit(r / "CUB_200_2011/image_class_labels.txt", "3 1", "3 7"),
            "one of 2 classes, found '7'",
        ),
        (
            "cub200",
            cub,
            lambda r: edit(r / "CUB_200_2011/train_test_split.txt", "3 1", "3 x"),
            "expected 0 or 1, found 'x'",
        ),
        ("cub200", cub, lambda r: edit(r / "CUB_200_2011/images.txt", "1 001", "1 ../001"), "expected paths below it"),
        ("cars", cars, lambda r: (r / "cars_test_annos_withlabels.mat").unlink(), "has no classes"),
        ("cars", cars, lambda r: (r / "devkit/cars_meta.mat").write_bytes(b"no matrix"), "expected a MATLAB file"),
        ("aircraft", aircraft, lambda r: shutil.rmtree(r / "fgvc-aircraft-2013b"), "expected variants.txt"),
        (
            "pets",
            pets,
            lambda r: edit(r / "annotations/test.txt", "Abyssinian_4 1", "Abyssinian_4 2"),
            "expected the class of",
        ),
        (
            "pets",
            pets,
            lambda r: edit(r / "annotations/test.txt", "Abyssinian_4", "Abyssinian_1"),
            "Abyssinian_1.jpg twice",
        ),
        ("inaturalist2018", inaturalist, without_category, "one of 2 categories, found 99"),
        (
            "inaturalist2018",
            inaturalist,
            lambda r: (r / "val2018.json").write_text("{"),
            "expected images, annotations and",
        ),
        ("inaturalist2019", inaturalist, lambda r: None, r"expected train2019\.json"),
    ],
)
def test_bad_sets_are_one_line(
    name: str, make: Callable[[Path], Path], change: Callable[[Path], Any], words: str, tmp_path: Path
) -> None:
    source = make(tmp_path / "source")
    change(source)
    with pytest.raises(UserError, match=words) as caught:
        arrange(name, source, tmp_path / "dest")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "dest").exists()


def test_classes_of_one_split_alone_are_refused(tmp_path: Path) -> None:
    source = pets(tmp_path / "source")
    edit(source / "annotations/trainval.txt", "great_pyrenees_2 2 2 1\n", "")
    with pytest.raises(UserError, match="found '2_great_pyrenees' in val alone"):
        small("pets", source, tmp_path / "dest")
    edit(source / "annotations/trainval.txt", "Abyssinian_1 1 1 1\n", "Abyssinian_1 1 1 1\ngreat_pyrenees_2 2 2 1\n")
    edit(source / "annotations/test.txt", "great_pyrenees_5 2 2 1\n", "")
    with pytest.raises(UserError, match="found '2_great_pyrenees' in train alone"):
        small("pets", source, tmp_path / "dest")


def test_other_numbers_than_published_are_said(tmp_path: Path) -> None:
    source = pets(tmp_path / "source")
    with pytest.raises(UserError, match="expected the 37 classes of pets, found 2; complete it, or add --subset"):
        arrange("pets", source, tmp_path / "dest")
    (source / "images/Abyssinian_3.jpg").unlink()
    result = small("pets", source, tmp_path / "dest")
    assert (result["train"], result["left_out"]) == (2, 1)
