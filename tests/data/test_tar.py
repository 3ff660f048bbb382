"""Walking tar headers: the same members as Python's tarfile, in every format, and one clear line about damage."""

import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_ds.data.tar import TarWalk
from lut_ds.errors import UserError
from tests.data.archives import write_tar

PART = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60)
NAME = st.lists(PART, min_size=1, max_size=8).map("/".join) | PART.map(lambda part: part * 9)
CONTENT = st.binary(max_size=3) | st.integers(500, 1030).map(bytes)


def walk(path: Path) -> list[tuple[bytes, int, int]]:
    with TarWalk(path) as tar:
        return [tuple(member) for member in tar]


def by_tarfile(path: Path) -> list[tuple[bytes, int, int]]:
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        return [(os.fsencode(m.name), m.offset_data, m.size) for m in tar if m.isreg()]


@given(
    files=st.lists(st.tuples(NAME, CONTENT), max_size=6),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(deadline=None)
def test_the_same_members_as_tarfile(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, bytes]], format: int
) -> None:
    """Names with any characters, beyond 100 and 255 bytes; empty files; an archive without members."""
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", files, format)
    found = walk(path)
    assert found == by_tarfile(path)
    assert [name for name, *_ in found] == [os.fsencode(name) for name, _ in files]
    with TarWalk(path) as tar:
        assert [tar.read(offset, size) for _, offset, size in found] == [data for _, data in files]


def test_ustar_prefix_and_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x"
            tar.addfile(info)
        info = tarfile.TarInfo("p" * 120 + "/" + "n" * 90)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"data"))
    assert walk(path) == by_tarfile(path) == [((b"p" * 120 + b"/" + b"n" * 90), 2048, 4)]


@pytest.mark.parametrize("format", ["v7", "ustar", "gnu", "oldgnu", "pax"])
def test_written_by_gnu_tar(tmp_path: Path, format: str) -> None:
    names = ["short", "dir/ü ü", *([] if format in ("v7", "ustar") else ["l" * 200])]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    command = ["tar", f"--format={format}", "-cf", "../a.tar", "--no-recursion", ".", "dir", *names]
    subprocess.run(command, cwd=tmp_path / "in", check=True)
    assert walk(tmp_path / "a.tar") == by_tarfile(tmp_path / "a.tar")
    assert [name.decode() for name, *_ in walk(tmp_path / "a.tar")] == names


def test_large_sizes_in_base_256(tmp_path: Path) -> None:
    """A member of 9 GiB, as GNU tar writes one, in a file with a hole."""
    path, size = tmp_path / "a.tar", 9 << 30
    info = tarfile.TarInfo("big.npy")
    info.size = size
    last = tarfile.TarInfo("a.jpg")
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + size)
        file.write(last.tobuf() + bytes(1024))
    assert walk(path) == [(b"big.npy", 512, size), (b"a.jpg", size + 1024, 0)]


FILES = [("a" * 150 + ".jpg", bytes(700)), ("b.jpg", b"data"), ("c.jpg", bytes(512))]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_cut_anywhere(tmp_path: Path, format: int) -> None:
    path = write_tar(tmp_path / "a.tar", FILES, format)
    data, (_, last, size) = path.read_bytes(), walk(path)[-1]
    for cut in [*range(0, last + size, 97), last, last + size - 1, last + size, last + size + 511]:
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=rf"shard {path}: byte \d+: expected .*, found .*(cut short|empty file)"):
            walk(path)
    path.write_bytes(data[: last + size + 512])
    assert len(walk(path)) == 3


@given(at=st.integers(0, 10**5), value=st.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_damage_is_an_error_of_one_line_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", FILES)
    data = bytearray(path.read_bytes())
    data[at % len(data)] = value
    path.write_bytes(data)
    message = ""
    try:
        assert len(walk(path)) <= 3
    except UserError as error:
        message = str(error)
    assert not message or message.startswith(f"shard {path}: byte ")


def test_what_is_no_plain_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES)
    path.write_bytes(gzip.compress(os.urandom(2000)))
    with pytest.raises(UserError, match="byte 0: expected an uncompressed tar, found a compressed file"):
        walk(path)
    path.write_bytes(b"text" * 1000)
    with pytest.raises(UserError, match="found no tar header"):
        walk(path)
    with pytest.raises(UserError, match="found: No such file"):
        walk(tmp_path / "none.tar")


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_sparse_files_are_refused(tmp_path: Path, format: str) -> None:
    with (tmp_path / "holes").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    subprocess.run(["tar", f"--format={format}", "--sparse", "-cf", "a.tar", "holes"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"a\.tar: byte \d+: .*found a sparse file; pack it again"):
        walk(tmp_path / "a.tar")
