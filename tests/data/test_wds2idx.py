"""The .idx files of DALI's own tool: read, written, and used by DALI's reader."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lut_ds.data.dali import fn, pipeline_def
from lut_ds.data.folder import ImageFolder
from lut_ds.data.indexing import export_idx
from lut_ds.data.shard_index import write_index
from lut_ds.data.shards import TarShards
from lut_ds.data.sources import open_source
from lut_ds.data.wds2idx import idx_path, read_idx, write_idx
from lut_ds.errors import RunFault, UserError
from tests.data.archives import pack, write_tar


def by_dali(shard: Path) -> Path:
    """Run NVIDIA's tool on a shard."""
    path = idx_path(shard)
    command = [sys.executable, "-m", "wds2idx", str(shard), str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C.UTF-8"})
    return path


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 42 photos in two shards with the index files of NVIDIA's tool."""
    root = pack(ImageFolder(photos), tmp_path_factory.mktemp("packed"), 2)
    for k in range(2):
        by_dali(root / f"{k:03d}.tar")
    return root


def test_shards_with_idx_files_need_no_other_index(packed: Path, photos: Path) -> None:
    folder = ImageFolder(photos)
    for source in (open_source(packed), TarShards.open(packed / "*.tar")):
        assert len(source) == 42
        assert [source.read(i) for i in range(42)] == [folder.read(i) for i in range(42)]
        assert [source.label(i) for i in range(42)] == [folder.label(i) for i in range(42)]
    one = TarShards.open(packed / "001.tar")
    assert one.read(0) == folder.read(21)
    assert one.name(0) == f"{packed}/001.tar:000021.jpg"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_ours_is_the_same_file(tmp_path: Path, format: int) -> None:
    names = ["a.jpg", "a.cls", "d.x/b.seg.PNG", "d.x/b.json", "sp ace.jpg", "c.jpg"]
    names += ["ü.jpg", "l" * 200 + ".jpg"] if format == tarfile.PAX_FORMAT else []
    shard = write_tar(tmp_path / "shard-0.tar", [(name, name.encode()) for name in names], format)
    assert write_idx(shard, tmp_path / "ours.idx") == len(names) - 2
    assert (tmp_path / "ours.idx").read_bytes() == by_dali(shard).read_bytes()
    expected = [
        [name for name in names if name.startswith(key)]
        for key in ("a", "d", "sp", "c", *(("ü", "l") if format else ()))
    ]
    found = [[os.fsdecode(member.name) for _, member in sample] for sample in read_idx(tmp_path / "ours.idx")]
    assert sorted(found) == sorted(expected[: len(found)])


def test_dali_reads_by_our_file(packed: Path, photos: Path, tmp_path: Path) -> None:
    write_idx(packed / "000.tar", tmp_path / "ours.idx")

    @pipeline_def(batch_size=21, num_threads=1, device_id=None)
    def graph() -> object:
        return fn.readers.webdataset(
            paths=[str(packed / "000.tar")],
            index_paths=[str(tmp_path / "ours.idx")],
            ext=["jpg"],
            missing_component_behavior="error",
        )

    pipe = graph()
    pipe.build()
    (images,) = pipe.run()
    folder = ImageFolder(photos)
    assert [np.array(images.at(i)).tobytes() for i in range(21)] == [folder.read(i) for i in range(21)]


def test_wrong_places_of_long_gnu_names_do_not_become_images(tmp_path: Path) -> None:
    """wds2idx gives the place of the long name for that of the file; a header that does not fit is an error, not an image."""
    shard = write_tar(tmp_path / "a.tar", [("n" * 200 + ".jpg", b"data"), ("b.jpg", b"more")], tarfile.GNU_FORMAT)
    by_dali(shard)
    source = TarShards.open(tmp_path)
    assert source.read(1) == b"more"
    with pytest.raises(RunFault, match="expected a member of 4 bytes"):
        source.read(0)
    write_idx(shard, idx_path(shard))
    assert TarShards.open(tmp_path).read(0) == b"data"
    write_index(tmp_path)
    assert TarShards.open(tmp_path).read(0) == b"data"


def test_version_1_1_has_no_names(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("x.jpg", b"data"), ("x.cls", b"3")])
    idx_path(shard).write_text("v1.1 1\njpg 512 4 cls 1536 1\n")
    source = TarShards.open(tmp_path)
    assert (source.read(0), source.label(0), source.name(0)) == (b"data", 3, f"{shard}:sample 0.jpg")


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("x.jpg", b"data")])
    for text, message in {
        "": r"line 1: expected `v1\.2 SAMPLES`, found b''",
        "v2.0 1\njpg 512 4 x.jpg\n": r"line 1: expected `v1\.2 SAMPLES`",
        "v1.2 2\njpg 512 4 x.jpg\n": "expected 2 samples, found 1",
        "v1.2 1\njpg 512 4 x.jpg\njpg 512 4 x.jpg\n": "expected 1 samples, found 2",
        "v1.2 1\njpg here 4 x.jpg\n": "line 2: expected extension, offset, size",
        "v1.2 1\njpg 99999 4 x.jpg\n": r"line 2: expected places inside a\.tar \(10240 bytes\), found 99999",
    }.items():
        idx_path(shard).write_text(text)
        with pytest.raises(UserError, match=message):
            TarShards.open(tmp_path)


def test_shards_that_would_share_an_idx_file(tmp_path: Path) -> None:
    """wds2idx cuts names at the first dot: the index of train-v1.1.tar would replace that of train-v1.0.tar."""
    shards = [write_tar(tmp_path / f"train-v1.{k}.tar", [(f"{k}.jpg", b"data")]) for k in range(2)]
    with pytest.raises(UserError, match=r"train-v1\.0\.tar and .*one index train-v1\.idx for both; rename"):
        export_idx(str(tmp_path), "train")
    assert not list(tmp_path.glob("*.idx"))
    write_idx(shards[0], idx_path(shards[0]))
    with pytest.raises(UserError, match=r"one index train-v1\.idx for both"):
        open_source(tmp_path)
    assert open_source(shards[0]).read(0) == b"data"
