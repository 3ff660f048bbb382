"""The image folder: which files it takes, in which order, and what it says about folders that do not work."""

import os
from pathlib import Path

import pytest

from lut_ds.data.sources import ImageFolder
from lut_ds.errors import RunFault, UserError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listing(source: ImageFolder, root: Path) -> list[tuple[str, int]]:
    return [(os.path.relpath(source.name(i), root), source.label(i)) for i in range(len(source))]


def test_class_folders_sorted_with_any_extension(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b/2.JPG",
        "b/1.jpeg",
        "a/x.PNG",
        "a/deep/er/y.webp",
        "c/z.TIFF",
        "c/readme.txt",
        "c/q.tif",
        "a/.p.jpg",
    )
    source = ImageFolder(tmp_path)
    assert source.classes == ["a", "b", "c"]
    expected = [
        ("a/x.PNG", 0),
        ("a/deep/er/y.webp", 0),
        ("b/1.jpeg", 1),
        ("b/2.JPG", 1),
        ("c/q.tif", 2),
        ("c/z.TIFF", 2),
    ]
    assert listing(source, tmp_path) == expected
    assert [source.read(i).decode() for i in range(len(source))] == [name for name, _ in expected]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = ImageFolder(touch(tmp_path, "b.bmp", "a.jpg"))
    assert source.classes == []
    assert listing(source, tmp_path) == [("a.jpg", -1), ("b.bmp", -1)]


def test_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/b/3.jpg")
    assert listing(ImageFolder(tmp_path), tmp_path) == [("train/a/1.jpg", 0), ("train/b/2.jpg", 1)]
    assert listing(ImageFolder(tmp_path, "val"), tmp_path) == [("val/b/3.jpg", 0)]
    assert ImageFolder(tmp_path, None).classes == ["train", "val"]
    with pytest.raises(UserError, match=r"expected a sub-folder val, found none"):
        ImageFolder(tmp_path / "train", "val")


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"a\xff.jpg")
    Path(os.fsdecode(path)).write_bytes(b"data")
    source = ImageFolder(tmp_path)
    assert os.fsencode(source.name(0)) == path
    assert source.read(0) == b"data"


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "data", "a/1.jpg")
    touch(tmp_path / "elsewhere", "2.jpg")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/circle").symlink_to(tmp_path / "data/a")
    assert listing(ImageFolder(tmp_path / "data"), tmp_path / "data") == [("a/1.jpg", 0), ("b/2.jpg", 1)]


def test_links_to_themselves_and_to_pipes(tmp_path: Path) -> None:
    """The first is a missing image, or nothing to see; a pipe would be read for ever."""
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a/circle").symlink_to("circle")
    (tmp_path / "a/2.jpg").symlink_to("2.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a/3.jpg").symlink_to(tmp_path / "pipe")
    assert listing(ImageFolder(tmp_path), tmp_path) == [("a/1.jpg", 0), ("a/2.jpg", 0)]


def test_folders_that_do_not_work(tmp_path: Path) -> None:
    touch(tmp_path, "file", "mixed/a/1.jpg", "mixed/2.jpg", "none/a/notes.txt")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "missing": "found nothing there",
        "file": "found a file",
        "empty": "found an empty folder",
        "none": "found none in it or in its 1 sub-folders",
        "mixed": "found both",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            ImageFolder(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "c.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "nowhere")
    source = ImageFolder(tmp_path)
    (tmp_path / "c.jpg").unlink()
    for i, name in ((1, "b.jpg"), (2, "c.jpg")):
        with pytest.raises(RunFault, match=f"{name}: cannot be read: No such file"):
            source.read(i)
    with pytest.raises(IndexError):
        source.read(3)
