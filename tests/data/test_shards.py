"""Tar shards as a source: WebDataset's samples and labels, many readers, few descriptors, and changed shards noticed."""

import contextlib
import errno
import json
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lut_ds.data.descriptors import Descriptors
from lut_ds.data.folder import ImageFolder
from lut_ds.data.index import SampleIndex
from lut_ds.data.loader import PretrainLoader
from lut_ds.data.order import SampleOrder
from lut_ds.data.shard_index import check_index, write_index
from lut_ds.data.shards import TarShards
from lut_ds.data.sources import Source, open_source
from lut_ds.data.views import LUT_VIEW1, LUT_VIEW2
from lut_ds.data.wds import split_key
from lut_ds.errors import RunFault, UserError
from tests.data.archives import File, pack, write_tar


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Path:
    """The 42 photos in three shards, indexed."""
    root = pack(ImageFolder(photos), tmp_path / "shards", 3)
    write_index(root)
    return root


def index_of(root: Path, *files: File) -> SampleIndex:
    root.mkdir(exist_ok=True)
    write_tar(root / "a.tar", files)
    write_index(root)
    return SampleIndex.open(root)


def test_keys_are_webdatasets() -> None:
    """Of `base_plus_ext` and the loader's rules: up to the first dot of the base name; hidden and meta files are passed over."""
    for name, expected in {
        "a.jpg": ("a", "jpg"),
        "dir.x/a.seg.PNG": ("dir.x/a", "seg.png"),
        "./a b.jpg": ("./a b", "jpg"),
        "a\nb.jpg": ("a\nb", "jpg"),
        "a.": ("a", ""),
        "a": None,
        "dir.x/a": None,
        ".hidden.jpg": None,
        "d/.hidden.jpg": None,
        "__key__": None,
        "__index__/a.jpg": None,
    }.items():
        found = split_key(name.encode())
        assert (found and tuple(part.decode() for part in found)) == expected, name


def test_samples_images_and_labels(tmp_path: Path) -> None:
    index = index_of(
        tmp_path,
        ("d/0.cls", b"7\n"),
        ("d/0.jpg", b"zero"),
        ("d/0.json", b'{"label": 1}'),  # .cls comes first
        ("d/1.json", json.dumps({"label": 2, "caption": "x"}).encode()),
        ("d/1.PNG", b"one"),
        ("e/1.jpg", b""),
        ("2.txt", b"a caption"),
        ("3.left.jpg", b"three"),
        ("4.left.jpg", b"left"),
        ("4.right.jpg", b"right"),
        ("5.jpg", b"five"),
        ("5.cls", b"-1"),
        ("6.webp", b"six"),
        ("6.json", b"{}"),
    )
    source = TarShards(index)
    names = [source.name(i).rpartition(":")[2] for i in range(len(source))]
    assert names == ["d/0.jpg", "d/1.PNG", "e/1.jpg", "3.left.jpg", "5.jpg", "6.webp"]
    assert [source.label(i) for i in range(6)] == [7, 2, -1, -1, -1, -1]
    assert [source.read(i) for i in range(6)] == [b"zero", b"one", b"", b"three", b"five", b"six"]
    assert source.classes == [str(i) for i in range(8)]
    assert write_index(tmp_path)["without_image"] == 2
    assert source.name(0) == f"{tmp_path}/a.tar:d/0.jpg"


def test_class_names_are_sorted_or_given(tmp_path: Path) -> None:
    files = [("0.jpg", b""), ("0.cls", b"zebra"), ("1.jpg", b""), ("1.json", b'{"class": "ant"}')]
    index = index_of(tmp_path, *files)
    assert (index.classes, index.labels().tolist()) == (["ant", "zebra"], [1, 0])
    assert check_index(tmp_path) == []
    (tmp_path / "classes.txt").write_text("cat\nant\nzebra\n")
    index = index_of(tmp_path, *files, ("2.jpg", b""), ("2.cls", b"0"))
    assert (index.classes, index.labels().tolist()) == (["cat", "ant", "zebra"], [2, 1, 0])
    for label, message in ((b"dog", "expected a class of classes.txt"), (b"3", "expected a number from 0 to 2")):
        with pytest.raises(UserError, match=rf"a\.tar: label .*{message}"):
            index_of(tmp_path, ("2.jpg", b""), ("2.cls", label))
    (tmp_path / "classes.txt").unlink()
    for bad, message in {
        b'{"label": [1]}': r"found \[1\]",
        b'{"label": true}': "found True",
        b"{": "not JSON",
        b'{"label": 3000000}': "expected a number from 0 to",
        b'{"label": -5}': "found -5",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            index_of(tmp_path, ("2.jpg", b""), ("2.json", bad))
        assert "a.tar" in str(caught.value)
    with pytest.raises(UserError, match="all numbers or all names, found both"):
        index_of(tmp_path, ("1.jpg", b""), ("1.cls", b"4"), ("2.jpg", b""), ("2.cls", b"dog"))
    with pytest.raises(UserError, match=r"a\.tar: byte \d+: .* found a second .*1\.jpg"):
        index_of(tmp_path, ("1.jpg", b""), ("1.jpg", b""))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_positions_give_the_same_bytes_as_the_folder(photos: Path, shards: Path) -> None:
    """A thousand positions over epochs, in the order of training, and their labels."""
    folder, packed = ImageFolder(photos), TarShards.open(shards)
    order = SampleOrder(len(folder), 5)
    assert len(packed) == len(folder)
    for epoch in range(24):
        for i in order.samples(epoch, np.arange(42)).tolist():
            assert packed.read(i) == folder.read(i)
            assert packed.label(i) == folder.label(i)


def test_views_are_the_folders_to_the_bit(photos: Path, shards: Path) -> None:
    def views(source: Source) -> list[torch.Tensor]:
        with PretrainLoader(
            source, [LUT_VIEW1, LUT_VIEW2], image_size=24, num_patches=9, seed=1, global_batch=16, micro_batch=8, rank=0,
            world_size=1, device=torch.device("cpu"), threads=2,
        ) as loader:  # fmt: skip
            return [view for batch in loader.batches(0, 4) for view in batch.views]

    expected = views(ImageFolder(photos))
    assert len(expected) == 16
    assert all(torch.equal(a, b) for a, b in zip(views(open_source(shards)), expected))


def opened_shards(root: Path) -> int:
    """How many of this process's descriptors are of shards in a folder."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own has gone
            file = Path(os.readlink(link))
            count += file.parent == root and file.suffix == ".tar"
    return count


def test_threads_with_fewer_descriptors_than_shards(photos: Path, tmp_path: Path) -> None:
    root = pack(ImageFolder(photos), tmp_path / "shards", 14)
    write_index(root)
    source, folder = TarShards(SampleIndex.open(root), open_shards=4), ImageFolder(photos)
    expected = [folder.read(i) for i in range(42)]
    orders = [np.random.default_rng(thread).permutation(np.tile(np.arange(42), 20)).tolist() for thread in range(8)]
    with ThreadPoolExecutor(8) as pool:
        wrong = pool.map(lambda order: sum(source.read(i) != expected[i] for i in order), orders)
        assert sum(wrong) == 0
    assert opened_shards(root) == 4
    source.close()
    assert opened_shards(root) == 0
    assert source.read(0) == expected[0]
    source.close()


def test_a_descriptor_in_use_is_not_closed(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / str(k)).write_text(str(k))
    held = Descriptors(lambda k: os.open(tmp_path / str(k), os.O_RDONLY), 1)
    with held.use(0) as first:
        for k in (1, 2):
            with held.use(k) as other:
                assert os.pread(other, 9, 0) == str(k).encode()
        held.close()
        assert os.pread(first, 9, 0) == b"0"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pread(first, 9, 0)
    assert len(held) == 0


def test_storage_that_comes_back_is_opened_anew(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system whose server restarted: every read through the old handle fails."""
    source = TarShards.open(shards)
    expected = source.read(0)
    stale: set[int] = set()

    def pread(fd: int, size: int, offset: int) -> bytes:
        if not stale:
            stale.add(fd)
        if fd in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return os_pread(fd, size, offset)

    os_pread = os.pread
    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(RunFault, match=r"000\.tar:000000\.jpg: byte 512: cannot be read: Stale file handle"):
        source.read(0)
    held = os.open(shards / "000.tar", os.O_RDONLY)  # takes the number that became free
    assert held in stale
    assert source.read(0) == expected
    os.close(held)


def test_two_threads_open_the_same_shard_once(tmp_path: Path) -> None:
    (tmp_path / "0").touch()
    both = threading.Barrier(2, timeout=600)
    opened = []

    def slowly(k: int) -> int:
        both.wait()
        opened.append(os.open(tmp_path / str(k), os.O_RDONLY))
        return opened[-1]

    held = Descriptors(slowly)

    def read(_: int) -> int:
        with held.use(0) as fd:
            os.fstat(fd)
            return fd

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(read, range(2))
    assert first == second
    held.close()
    for fd in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_many_workers_write_the_same_index(photos: Path, shards: Path) -> None:
    done: list[tuple[int, int]] = []
    result = write_index(shards, shards / "other.lut", workers=2, progress=lambda *at: done.append(at))
    assert (shards / "other.lut").read_bytes() == (shards / "index.lut").read_bytes()
    assert done == [(1, 3), (2, 3), (3, 3)]
    sizes = [path.stat().st_size for path in photos.rglob("*.jpg")]
    expected = {"shards": 3, "samples": 42, "bytes": sum(sizes), "classes": 2, "without_image": 0}
    assert result == {"index": str(shards / "other.lut"), **expected}


def test_an_index_that_agrees_and_one_that_does_not(shards: Path, tmp_path: Path) -> None:
    assert check_index(shards) == []
    assert check_index(shards / "index.lut", workers=2) == []
    write_tar(shards / "001.tar", [("other.jpg", b"data"), ("other.cls", b"1")])
    (shards / "000.tar").unlink()
    write_tar(shards / "009.tar", [])
    problems = check_index(shards)
    assert f"{shards}/009.tar: not in the index" in problems
    assert any(p.startswith(f"shard {shards}/000.tar: expected a readable tar, found: No such file") for p in problems)
    assert any("001.tar: 10240 bytes, " in p for p in problems)
    assert any("byte 512: other.jpg, 4 bytes; in the index: 000014.jpg, " in p for p in problems)
    assert sum("001.tar: byte" in p and "nothing there; in the index: 0000" in p for p in problems) == 13
    assert len(problems) == 17


def test_a_changed_label_is_noticed(tmp_path: Path) -> None:
    index_of(tmp_path, ("0.jpg", b""), ("0.cls", b"1"))
    write_tar(tmp_path / "a.tar", [("0.jpg", b""), ("0.cls", b"0")])
    assert check_index(tmp_path) == [f"{tmp_path}/a.tar: byte 512: 0.jpg: label 0; in the index: 1"]


def test_damaged_shards_are_named_when_indexed(shards: Path) -> None:
    data = (shards / "002.tar").read_bytes()
    (shards / "002.tar").write_bytes(data[: len(data) // 2])
    before = (shards / "index.lut").read_bytes()
    with pytest.raises(UserError, match=r"shard .*002\.tar: byte \d+: .*cut short"):
        write_index(shards)
    with pytest.raises(UserError, match=r"shard .*002\.tar: byte \d+: .*cut short"):
        write_index(shards, workers=2)
    assert (shards / "index.lut").read_bytes() == before


def test_changed_shards_are_noticed_when_read(shards: Path) -> None:
    data = (shards / "000.tar").read_bytes()
    source = TarShards.open(shards)
    (shards / "000.tar").write_bytes(data[:-1024])
    with pytest.raises(RunFault, match=rf"000\.tar: expected {len(data)} bytes as .*, found {len(data) - 1024}"):
        source.read(0)
    (shards / "000.tar").write_bytes(bytes(512) + data[:-512])  # as long, but everything moved
    with pytest.raises(RunFault, match=r"000\.tar:000000\.jpg: byte 512: .*the shard was changed"):
        source.read(0)
    (shards / "000.tar").unlink()
    other = TarShards.open(shards)
    with pytest.raises(RunFault, match=r"000\.tar:000000\.jpg: .*No such file"):
        other.read(0)
    assert other.read(20)
    os.truncate(shards / "001.tar", 1024)  # below an open descriptor
    with pytest.raises(RunFault, match=r"001\.tar:000020\.jpg: .*changed or cut short"):
        other.read(20)


def test_shards_without_an_index_or_images(shards: Path, tmp_path: Path) -> None:
    (shards / "index.lut").unlink()
    with pytest.raises(UserError, match=r"an index of the 3 shards, found none .* write it with `lut-ds data index"):
        open_source(shards)
    with pytest.raises(UserError, match=r"expected \.tar shards, found none"):
        TarShards.open(tmp_path / "no*.tar")
    write_tar(tmp_path / "a.tar", [("a.txt", b"")])
    with pytest.raises(UserError, match="expected images in the 1 shards, found none"):
        write_index(tmp_path)
    with pytest.raises(UserError, match="expected an output"):
        write_index(shards / "00*.tar")
    assert write_index(shards / "00[01].tar", tmp_path / "some.lut")["samples"] == 28
    assert open_source(tmp_path / "some.lut").read(27) == open_source(tmp_path / "some.lut").read(27) != b""


def test_gnu_long_names(tmp_path: Path) -> None:
    name = "n" * 300 + ".jpg"
    write_tar(tmp_path / "a.tar", [(name, b"data"), ("ü\n" * 60 + ".jpg", b"more")], tarfile.GNU_FORMAT)
    write_index(tmp_path)
    source = TarShards.open(tmp_path)
    assert (source.read(0), source.read(1)) == (b"data", b"more")
    assert source.name(0).endswith(name)
