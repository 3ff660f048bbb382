"""Packing: the same shards whatever the workers and interruptions, nothing lost, nothing of others touched."""

import errno
import fcntl
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lut_ds.data.order import SampleOrder
from lut_ds.data.pack import Options, pack
from lut_ds.data.packing import Encoder, write_shard
from lut_ds.data.pipeline import decode_one
from lut_ds.data.sources import ImageFolder, open_source
from lut_ds.data.validity import image_hw
from lut_ds.errors import RunFault, UserError
from tests.data.images import encode, photo, write_folder
from tests.data.planted import GOOD, rotated

PER_SHARD = Options(seed=3, samples_per_shard=10)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".json"}


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("packed") / "out"
    return out, pack(str(photos), out, PER_SHARD)


def test_the_shards_are_the_folder_in_the_order_of_the_seed(photos: Path, packed: tuple[Path, dict[str, Any]]) -> None:
    out, result = packed
    folder, shards = ImageFolder(photos), open_source(out)
    order = SampleOrder(len(folder), 3).samples(0, np.arange(len(folder))).tolist()
    assert [shards.read(i) for i in range(len(shards))] == [folder.read(i) for i in order]
    assert [shards.label(i) for i in range(len(shards))] == [folder.label(i) for i in order]
    assert shards.classes == folder.classes
    assert Path(folder.name(order[0])).stem in shards.name(0)
    assert (result["samples"], result["shards"], result["skipped"]) == (42, 5, 0)
    with tarfile.open(out / "shard-000004.tar") as tar:
        members = tar.getmembers()
    assert len(members) == 2 * 2  # the rest, each with its label
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


def test_workers_and_time_change_no_byte(photos: Path, packed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pack(str(photos), tmp_path / "out", PER_SHARD, workers=3)
    assert {name: data for name, data in files(tmp_path / "out").items() if name != "index.lut"} == {
        name: data for name, data in files(packed[0]).items() if name != "index.lut"
    }  # the index holds the times of the shards


def test_stopped_and_run_again_it_writes_what_is_missing(
    photos: Path, packed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = pack(str(photos), out, PER_SHARD, stopped=lambda: (out / "shard-000001.tar").exists())
    assert not first["complete"]
    assert 0 < first["shards_missing"] < 5
    with pytest.raises(UserError, match=r"expected an index"):
        open_source(out)  # half of the data is no data set
    kept = (out / "shard-000000.tar").stat().st_mtime_ns
    (out / ".shard-000003.tar.partial").write_bytes(b"cut short by a crash")
    assert pack(str(photos), out, PER_SHARD)["complete"]
    assert (out / "shard-000000.tar").stat().st_mtime_ns == kept
    for name, data in files(packed[0]).items():
        assert name == "index.lut" or (out / name).read_bytes() == data
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_larger_images_are_made_smaller(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "large.png").write_bytes(encode(photo(120, 91), "PNG"))
    (tmp_path / "in" / "small.png").write_bytes(encode(photo(30, 50), "PNG"))
    (tmp_path / "in" / "turned.jpg").write_bytes(rotated())
    pack(str(tmp_path / "in"), tmp_path / "out", Options(shorter_side=40, quality=90))
    shards = open_source(tmp_path / "out")
    found = {shards.name(i).rpartition("_")[2]: shards.read(i) for i in range(len(shards))}
    assert sorted(found) == ["large.jpg", "small.png", "turned.jpg"]
    assert found["small.png"] == (tmp_path / "in" / "small.png").read_bytes()
    # Not turned, as in training, and without the tag that would make another reader turn it.
    assert [image_hw(found[name], "") for name in ("large.jpg", "turned.jpg")] == [(52, 40), (40, 50)]
    assert Image.open(tmp_path / "in" / "turned.jpg").getexif()
    expected = photo(120, 91).resize((40, 52), Image.Resampling.LANCZOS)
    assert np.abs(decode_one(found["large.jpg"]).astype(int) - np.asarray(expected).astype(int)).mean() < 12
    assert np.array_equal(decode_one(found["large.jpg"]), decode_one(encode(expected, quality=90, subsampling="4:2:0")))


def test_what_cannot_be_packed_is_listed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(encode(photo(50, 50, i)))
    (tmp_path / "in" / "half.jpg").write_bytes(GOOD[:700])
    (tmp_path / "in" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    result = pack(str(tmp_path / "in"), tmp_path / "out", Options(shorter_side=32, samples_per_shard=4), workers=2)
    assert (result["samples"], result["skipped"]) == (5, 2)
    said = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {Path(line["name"]).name for line in said} == {"half.jpg", "gone.jpg"}
    assert all(line["reason"] for line in said)


def test_the_size_of_shards_is_about_what_was_asked(photos: Path, tmp_path: Path) -> None:
    pack(str(photos), tmp_path / "out", Options(shard_size=50_000))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(sizes) > 2
    assert all(30_000 < size < 80_000 for size in sizes[:-1])


def test_other_options_and_other_folders_are_refused(
    photos: Path, packed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    before = files(packed[0])
    with pytest.raises(UserError, match="seed is 3 there and 4 here"):
        pack(str(photos), packed[0], Options(seed=4, samples_per_shard=10))
    with pytest.raises(UserError, match="samples_per_shard is 10 there and None here"):
        pack(str(photos), packed[0], Options(seed=3))
    assert files(packed[0]) == before
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="expected an empty folder"):
        pack(str(photos), tmp_path, PER_SHARD)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_too_little_space_is_found_before_anything_is_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(UserError, match=r"GB of free space for the shards, found 0\.000 GB"):
        pack(str(photos), tmp_path / "out", PER_SHARD)
    assert not (tmp_path / "out").exists()


def test_classes_that_a_line_cannot_hold_are_refused_first(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 2)
    (tmp_path / "in" / "class1").rename(tmp_path / "in" / "two\nlines")
    with pytest.raises(UserError, match=r"class 'two\\nlines': expected a name without line breaks"):
        pack(str(tmp_path / "in"), tmp_path / "out", PER_SHARD)
    assert not (tmp_path / "out").exists()


def test_no_shards_among_the_images(tmp_path: Path) -> None:
    """Their folder would be a class, and shift the labels of a pack that goes on."""
    write_folder(tmp_path / "in", 2)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for out in (tmp_path / "in" / "a", tmp_path / "link" / "class0" / "a", tmp_path / "in"):
        with pytest.raises(UserError, match="expected a folder outside of the images"):
            pack(str(tmp_path / "in"), out, PER_SHARD)


def test_an_added_class_is_another_data_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 4)
    pack(str(tmp_path / "in"), tmp_path / "out", PER_SHARD)
    (tmp_path / "in" / "another").mkdir()  # without images, but it shifts the labels
    with pytest.raises(UserError, match="expected shards of the same samples"):
        pack(str(tmp_path / "in"), tmp_path / "out", PER_SHARD)


def test_storage_that_is_away_makes_no_empty_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lut_ds.data.packing._RETRY_SECONDS", 0.2)
    source = ImageFolder(write_folder(tmp_path / "in", 4))
    (tmp_path / "in").rename(tmp_path / "unmounted")
    with pytest.raises(RunFault, match="nor could any other file"):
        write_shard(tmp_path / "0.tar", source, np.arange(4), np.arange(4), Encoder(None, None))
    assert not (tmp_path / "0.tar").exists()


def test_two_at_a_time_are_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "in", 4)
    out = tmp_path / "out"
    assert not pack(str(tmp_path / "in"), out, PER_SHARD, stopped=lambda: True)["complete"]
    with (out / "pack.json").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="found one that runs"):
            pack(str(tmp_path / "in"), out, PER_SHARD)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # Lustre without its locks

    monkeypatch.setattr("fcntl.flock", refuse)
    assert pack(str(tmp_path / "in"), out, PER_SHARD)["complete"]
