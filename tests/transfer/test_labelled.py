"""Labels that cannot be evaluated are refused in one line, by the command too."""

import json
import shutil

import pytest

from lut_ds.errors import UserError
from lut_ds.transfer.labelled import check_labelled, open_labelled
from tests.data.images import write_folder
from tests.transfer.runs import lut_ds


class Source:
    def __init__(self, labels, classes=("a", "b")):
        self.labels, self.classes = labels, list(classes)

    def __len__(self):
        return len(self.labels)

    def label(self, i):
        return self.labels[i]

    def name(self, i):
        return f"image {i}"


@pytest.mark.parametrize(
    "train, val, words",
    [
        (Source([0, 1, 2]), Source([0, 1]), r"train: expected labels from 0 to 1, found 2 at image 2 \(1 images"),
        (Source([0, 1]), Source([0, 1, -1]), "val: expected labels from 0 to 1, found -1 at image 2"),
        (Source([0, 0]), Source([0, 1]), r"train: expected images of each of 2 classes, found none of 'b' \(1 empty"),
        (Source([0, 1]), Source([1, 1]), "val: .* found none of 'a'"),
        (Source([0, 1]), Source([0, 1], ("a", "c")), r"found 'b' in train alone \(2 and 2 classes, 2 differ"),
        (Source([0], ()), Source([0], ()), "found no labels"),
    ],
)
def test_labels_that_do_not_fit(train, val, words):
    with pytest.raises(UserError, match=words):
        check_labelled(train, val, "data")
    check_labelled(Source([0, 1]), Source([1, 0]), "data")


def test_folders(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / split, 4)
    train, val = open_labelled(str(tmp_path))
    assert (len(train), len(val)) == (4, 4)
    (tmp_path / "val" / "class2").mkdir()
    (tmp_path / "train" / "class2").mkdir()
    with pytest.raises(UserError, match="found none of 'class2'"):
        open_labelled(str(tmp_path))


def test_the_command_exits_2_and_writes_nothing(lut_run, tmp_path):
    shutil.copytree(lut_run / "data", tmp_path / "data")
    shutil.move(tmp_path / "data" / "val" / "3", tmp_path / "data" / "val" / "z")
    done = lut_ds("knn", str(lut_run), "--data", "data", "-o", "out", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "found '3' in train alone" in done.stderr
    assert not (tmp_path / "out").exists()
    done = lut_ds("knn", str(lut_run), "--k", "5", "-o", "out", "--cache", "cache", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "results.json").read_text())
    assert (tmp_path / "out" / "knn.png").is_file()
