"""The index file: what is written comes back, damage is noticed, and nothing is left of what was not finished."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_ds.data.index import Entry, Kind, SampleIndex
from lut_ds.data.index_writer import IndexWriter
from lut_ds.errors import UserError

NAMES = st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass"))
ROWS = st.lists(st.tuples(NAMES, st.integers(0, 2**32 - 1), st.integers(-1, 4), st.integers(0, 2**62)), max_size=30)


def write(path: Path, count: int = 10, kind: Kind = "tar") -> Path:
    with IndexWriter(path, kind) as writer:
        shard = writer.add_shard("a.tar", 100, 7)
        for i in range(count):
            writer.append(f"image{i}.jpg", shard, 10 * i, i % 3, 512 * i)
        writer.finish(["x", "y", "z"])
    return path


@given(rows=ROWS, kind=st.sampled_from(["tar", "files"]), split=st.integers(0, 30), shards=st.lists(NAMES, min_size=1))
@settings(deadline=None)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list, kind: Kind, split: int, shards: list[bytes]
) -> None:
    """Any names, some appended one by one and some in a column."""
    path = tmp_path_factory.mktemp("index") / "index.lut"
    with IndexWriter(path, kind) as writer:
        numbers = [writer.add_shard(name, k, 2 * k) for k, name in enumerate(shards)]
        for name, size, label, offset in rows[:split]:
            writer.append(name, numbers[0], size, label, offset)
        names, sizes, labels, offsets = zip(*rows[split:]) if rows[split:] else ((), (), (), ())
        writer.extend(b"".join(names), list(map(len, names)), numbers[-1], sizes, labels, offsets)
        assert len(writer) == len(rows)
        writer.finish(["ü", "\n"])
    index = SampleIndex(path)
    index.check_content()
    assert (len(index), index.kind, index.classes, index.shard_count) == (len(rows), kind, ["ü", "\n"], len(shards))
    for i, (name, size, label, offset) in enumerate(rows):
        shard = numbers[0] if i < split else numbers[-1]
        assert index.entry(i) == Entry(os.fsdecode(name), shard, offset if kind == "tar" else 0, size, label)
        assert index.name(i) == name
    assert [index.shard_name(k) for k in range(len(shards))] == shards
    assert index.labels().tolist() == [label for _, _, label, _ in rows]
    with pytest.raises(IndexError):
        index.entry(len(rows))
    with pytest.raises(IndexError):
        index.name(-1)


def test_names_across_blocks(tmp_path: Path) -> None:
    """More names than share a start, from both ways of writing."""
    names = [f"{i:x}" * (i % 4) for i in range(140_000)]
    with IndexWriter(tmp_path / "index.lut", "tar") as writer:
        shard = writer.add_shard("s")
        for name in names[:70_000]:
            writer.append(name, shard)
        rest = names[70_000:]
        writer.extend("".join(rest).encode(), list(map(len, rest)), shard, 1, 2, np.arange(len(rest)))
        writer.finish()
    index = SampleIndex.open(tmp_path)
    for i in [0, 1, 65_535, 65_536, 65_537, 69_999, 70_000, 131_071, 131_072, 139_999]:
        assert index.name(i) == names[i].encode()
    assert index.entry(139_999)[2:] == (69_999, 1, 2)


def test_relabelling(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "index.lut", "files") as writer:
        for label in (0, 2, -1, 1, 0):
            writer.append("n", 0, label=label)
        writer.finish(["a", "b", "c"], np.array([2, 0, 1], np.int32))
    index = SampleIndex.open(tmp_path)
    index.check_content()
    assert index.labels().tolist() == [2, 1, -1, 0, 2]


def test_the_root_moves_with_the_index_or_stays(tmp_path: Path) -> None:
    for root, expected in ((".", tmp_path / "b"), ("deep/er", tmp_path / "b/deep/er"), ("/data", Path("/data"))):
        with IndexWriter(tmp_path / "a/index.lut", "files", root) as writer:
            writer.finish()
        (tmp_path / "a").rename(tmp_path / "b")
        assert SampleIndex.open(tmp_path / "b").root == expected
        (tmp_path / "b").rename(tmp_path / "a")


def test_left_unfinished_nothing_is_there_and_the_old_one_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "index.lut")
    before = path.read_bytes()

    def interrupted() -> None:
        with IndexWriter(path, "tar") as writer:
            writer.append("x", writer.add_shard("b.tar"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # others may read it


@given(cut=st.integers(0, 10**6))
@settings(deadline=None)
def test_cut_short(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = write(tmp_path_factory.mktemp("index") / "index.lut")
    data = path.read_bytes()
    path.write_bytes(data[: cut % len(data)])
    with pytest.raises(UserError, match=r"index .*index.lut: expected .*lut-ds data index"):
        SampleIndex(path)


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(deadline=None)
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    """At opening, or by the full check; the eight bytes of padding in the header aside."""
    path = write(tmp_path_factory.mktemp("index") / "index.lut")
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    if 56 <= at < 64:
        return
    with pytest.raises(UserError, match="expected"):
        SampleIndex(path).check_content()


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found No such file"):
        SampleIndex(tmp_path / "none.lut")
    (tmp_path / "text.lut").write_text("v1.2 3\njpg 512 5 a.jpg\n" * 9)
    with pytest.raises(UserError, match=r"an index of lut-ds, found a file that starts with b'v1\.2"):
        SampleIndex(tmp_path / "text.lut")
    data = bytearray(write(tmp_path / "index.lut").read_bytes())
    data[8] = 9
    (tmp_path / "index.lut").write_bytes(data)
    with pytest.raises(UserError, match="expected version 1, found version 9"):
        SampleIndex(tmp_path / "index.lut")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        IndexWriter(tmp_path / "file" / "index.lut", "tar")
    with IndexWriter(tmp_path / "x.lut", "tar") as writer:
        with pytest.raises(UserError, match="below 4 GiB"):
            writer.extend(b"n", [1], 0, [1 << 32], 0, 0)
        with pytest.raises(UserError, match="names below 32768 bytes"):
            writer.extend(b"n" * 40_000, [40_000], 0, 0, 0, 0)
        writer.extend(b"n", [1], 3, 0, 0, 0)
        with pytest.raises(ValueError, match="shard by shard"):
            writer.extend(b"n", [1], 2, 0, 0, 0)
