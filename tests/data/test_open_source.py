"""What `data.path` may be: folders with and without an index, lists, and sources of one's own."""

import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lut_ds.config import parse_recipe
from lut_ds.data.filelist import FileList
from lut_ds.data.files import IndexedFiles
from lut_ds.data.folder import ImageFolder
from lut_ds.data.sources import Source, index_source, open_source
from lut_ds.engine.reading import open_source as open_recipe
from lut_ds.errors import RunFault, UserError
from tests.data.test_sources import touch

EXAMPLE = Path(__file__).parents[2] / "examples" / "zip_source.py"


def everything(source: Source) -> tuple[list[str], list[tuple[str, int, bytes]]]:
    rows = [(source.name(i), source.label(i), source.read(i)) for i in range(len(source))]
    return source.classes, rows


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of two classes and a deeper one, with names that are no text."""
    root = touch(
        tmp_path / "data", "b/2.jpg", "b/1.jpg", "a/x.PNG", "a/deep/er/y.webp", "a/new\nline.jpg", "empty/notes"
    )
    Path(os.fsdecode(os.fsencode(root) + b"/b/\xff.jpg")).write_bytes(b"odd")
    return root


def test_an_indexed_folder_is_the_folder(tree: Path) -> None:
    expected = everything(ImageFolder(tree))
    assert expected[0] == ["a", "b", "empty"]
    found: list[int] = []
    result = index_source(tree, progress=lambda done, of: found.append(done))
    assert result == {"kind": "folder", "index": str(tree / "index.lut"), "folders": 5, "samples": 6, "classes": 3}
    assert found[-1] == 6
    source = open_source(tree)
    assert isinstance(source, IndexedFiles)
    assert everything(source) == expected
    index_source(tree, tree.parent / "elsewhere.lut")
    assert everything(open_source(tree.parent / "elsewhere.lut")) == expected
    with pytest.raises(IndexError):
        source.read(6)
    (tree / "a/x.PNG").unlink()
    with pytest.raises(RunFault, match=r"x\.PNG: cannot be read: No such file"):
        source.read(1)


def test_an_indexed_folder_moves(tree: Path, tmp_path: Path) -> None:
    index_source(tree)
    tree.rename(tmp_path / "moved")
    assert everything(open_source(tmp_path / "moved")) == everything(ImageFolder(tmp_path / "moved"))


def test_splits_and_flat_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "val/b/3.jpg", "flat/1.jpg", "flat/sub/notes")
    for split in ("train", "val"):
        index_source(tmp_path, split=split)
        assert everything(open_source(tmp_path, split)) == everything(ImageFolder(tmp_path, split))
    index_source(tmp_path / "flat")
    assert isinstance(open_source(tmp_path / "flat"), IndexedFiles)
    assert everything(open_source(tmp_path / "flat")) == everything(ImageFolder(tmp_path / "flat"))
    with pytest.raises(UserError, match="expected a sub-folder val"):
        open_source(tmp_path / "flat", "val")
    with pytest.raises(UserError, match="one set of images"):
        open_source(tmp_path / "flat/index.lut", "val")


def test_a_stale_index_is_refused(tree: Path) -> None:
    index_source(tree)
    touch(tree, "b/notes.txt")  # the folder changed, its images did not
    open_source(tree)
    touch(tree, "b/3.jpg")
    with pytest.raises(
        UserError, match=r"data/b: expected 3 images as .*index\.lut has it, found 4: .*lut-ds data index"
    ):
        open_source(tree)
    index_source(tree)
    (tree / "a").rename(tree / "c")
    with pytest.raises(UserError, match=r"expected an image as .*, found nothing: the folder changed"):
        open_source(tree)
    (tree / "index.lut").rename(tree.parent / "index.lut")
    with pytest.raises(UserError, match="expected an image as"):
        open_source(tree.parent / "index.lut")


def test_list_files(tree: Path) -> None:
    absolute = tree.parent / "absolute.jpg"
    absolute.write_bytes(b"absolute")
    path = tree / "list.txt"
    lines = ["# a comment", "", "b/1.jpg\tdog", "a/x.PNG\tant\r", f"{absolute}", "a/deep/er/y.webp\tdog"]
    path.write_text("\n".join(lines))
    source = open_source(path)
    assert isinstance(source, FileList)
    classes, rows = everything(source)
    assert classes == ["ant", "dog"]
    assert [(os.path.relpath(name, tree), label) for name, label, _ in rows] == [
        ("b/1.jpg", 1),
        ("a/x.PNG", 0),
        ("../absolute.jpg", -1),
        ("a/deep/er/y.webp", 1),
    ]
    assert rows[0][2] == b"b/1.jpg"
    result = index_source(path)
    assert result == {"kind": "list", "index": str(tree / "list.lut"), "folders": 4, "samples": 4, "classes": 2}
    assert everything(open_source(tree / "list.lut")) == (classes, rows)
    path.write_text("b/1.jpg\t3\nb/2.jpg\n")
    assert [FileList(path).label(i) for i in range(2)] == [3, -1]
    assert FileList(path).classes == ["0", "1", "2", "3"]
    (tree / "classes.txt").write_text("w\nx\ny\nz\n")
    assert FileList(path).classes == ["w", "x", "y", "z"]
    (tree / "classes.txt").write_text("w\u2028x\r\n\x1cy\n\nz\n")
    with pytest.raises(UserError, match="one class a line"):
        FileList(path)
    (tree / "classes.txt").write_text("w\u2028x\r\n\x1cy\nz\nlast")  # only a line feed ends a line
    assert FileList(path).classes == ["w\u2028x", "\x1cy", "z", "last"]
    (tree / "classes.txt").unlink()
    path.write_text("b/1.jpg\t2020_01\nb/2.jpg\t2019_07\n")  # Python's int() takes these for numbers
    assert FileList(path).classes == ["2019_07", "2020_01"]


def test_list_files_that_do_not_work(tree: Path) -> None:
    path = tree / "list.lst"
    for text, message in {
        "b/1.jpg\n\tdog\n": "line 2: expected path or path<TAB>label, found b'.tdog'",
        "b/1.jpg\t1\nb/2.jpg\tdog\n": "line 2: label 'dog': expected labels to be all numbers or all names",
        "b/1.jpg\t-2\n": "line 1: label -2: expected a number from 0",
        "# nothing\n\n": "expected paths of images, found none",
        "b/1.jpg\n\n# here\nb/missing.jpg\n": "line 4: expected an image, found nothing at",
        "b/\0.jpg\n": "line 1: expected path",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            open_source(path)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match=r"list .*none\.txt: cannot be read: No such file"):
        open_source(tree / "none.txt")


def test_what_is_nothing_of_it(tree: Path) -> None:
    for path, message in {
        tree / "b/1.jpg": "expected a folder of images, .tar shards, an index .* found another file",
        tree / "nowhere": "found nothing there",
        tree / "nowhere.lut": r"index .*nowhere\.lut: expected a readable file, found No such file",
        tree / "nowhere-*.tar": "expected .tar shards, found none",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(path)


@pytest.fixture
def zipped(tree: Path) -> Path:
    path = tree.parent / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(
            ["val/b/3.jpg", "train/b/1.jpg", "train/a/deep/2.png", "train/a/1.jpg", "train/0.jpg", "notes.txt"]
        ):
            archive.writestr(name, name * 50, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][i % 2])
    return path


def test_the_example_of_ones_own_source(zipped: Path) -> None:
    spec = f"{EXAMPLE}:ZipImages?{zipped}"
    source = open_recipe(parse_recipe({"data": {"path": spec}}, "test"))
    classes, rows = everything(source)
    names = ["train/0.jpg", "train/a/1.jpg", "train/a/deep/2.png", "train/b/1.jpg"]
    assert classes == ["a", "b"]
    assert rows == [(f"{zipped}:{name}", label, (name * 50).encode()) for name, label in zip(names, [-1, 0, 0, 1])]
    assert everything(open_source(spec, "val"))[1] == [(f"{zipped}:val/b/3.jpg", 0, b"val/b/3.jpg" * 50)]
    assert len(open_source(spec, None)) == 5
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, [i % 4 for i in range(400)])) == [rows[i % 4][2] for i in range(400)]
    zipped.write_bytes(bytes(zipped.stat().st_size))  # under the open source
    for i, found in ((0, "expected CRC-32"), (1, "cannot be read: "), (2, "expected CRC-32")):
        with pytest.raises(RunFault, match=rf"images\.zip:train/.*: {found}"):
            source.read(i)
    with pytest.raises(UserError, match="expected a zip file, found"):
        open_source(spec)


def test_a_source_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "class Three:\n"
        "    classes = ['c']\n"
        "    def __init__(self, argument, split): self.said = (argument, split)\n"
        "    def __len__(self): return 3 if 'none' not in self.said else 0\n"
        "    def read(self, i): return b''\n"
        "    def label(self, i): return 0\n"
        "    def name(self, i): return f'{self.said} {i}'\n"
        "def nothing(argument, split): return object()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert open_source("mine:Three?a=b?c", "val").name(2) == "('a=b?c', 'val') 2"
    assert open_source("mine:Three").name(0) == "('', 'train') 0"
    for spec, message in {
        "mine:Four": "AttributeError: .*Four",
        "not_there:Three": "ModuleNotFoundError: .*not_there",
        f"{tmp_path}/none.py:Three": "FileNotFoundError",
        "mine:nothing": "expected a source with __len__, read, label, name, classes, found none of __len__, read",
        "mine:Three?none": "expected images, found none",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(spec)
    sys.modules.pop("mine")
