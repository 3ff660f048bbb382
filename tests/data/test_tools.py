"""`lut-ds data ...` as a user meets it: exit codes, clean standard output, Ctrl-C, kill -9, a decoder that crashes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lut_ds.analysis.contact_sheet import show_views
from lut_ds.config import load_recipe
from lut_ds.data.clean import write_subset
from lut_ds.data.indexing import check, index
from lut_ds.data.pack import Options, pack
from lut_ds.data.shard_index import write_index
from lut_ds.data.sources import ImageFolder, open_source
from lut_ds.data.verify import verify
from lut_ds.errors import UserError
from tests.data.archives import write_tar
from tests.data.images import encode, photo, write_folder
from tests.data.planted import GOOD, plant
from tests.engine.launching import PATIENCE
from tests.test_cli import BAD_INPUT, DONE, lut_ds, refused, result

STOPPED = 3


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_faults_are_counted_and_strict_is_strict(tmp_path: Path) -> None:
    reasons, _ = plant(tmp_path / "data")
    arguments = ("data", "verify", tmp_path / "data", "--out", tmp_path / "out", "--workers", 2, "--strict", "--json")
    done = lut_ds(*arguments)
    assert done.returncode == BAD_INPUT
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    assert found["quarantined"] == len(reasons)
    assert found == json.loads((tmp_path / "out" / "summary.json").read_text())
    names = {os.path.relpath(line["name"], tmp_path / "data") for line in lines(tmp_path / "out" / "quarantine.jsonl")}
    assert names == set(reasons)


def test_a_decoder_that_crashes_names_its_file(tmp_path: Path) -> None:
    """A fault that Python cannot catch, where the decoder would have it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, sys\n"
        "class Trap:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'lut_ds.data.inspection':\n"
        "            from lut_ds.data import decoding\n"
        "            whole = decoding.Decoder.__call__\n"
        "            decoding.Decoder.__call__ = lambda self, data: (\n"
        "                ctypes.string_at(0) if data.endswith(b'CRASH') else whole(self, data))\n"
        "sys.meta_path.insert(0, Trap())\n"
    )
    write_folder(tmp_path / "data", 20, height=32, width=32)
    for name in ("x.jpg", "y.jpg"):
        (tmp_path / "data" / "class0" / name).write_bytes(GOOD + b"CRASH")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = result("data", "verify", tmp_path / "data", "--out", tmp_path / "out", "--workers", 2, PYTHONPATH=path)
    assert (found["usable"], found["reasons"]) == (20, {"crashes the decoder": 2})
    said = {Path(line["name"]).name: line["detail"] for line in lines(tmp_path / "out" / "quarantine.jsonl")}
    assert said == {"x.jpg": "killed by SIGSEGV", "y.jpg": "killed by SIGSEGV"}


# The command, which gets a signal as soon as something is in its journal.
INTERRUPTED = """
import os, sys
from lut_ds.cli import main
from lut_ds.data.journal import Journal

write = Journal.write

def interrupted(*arguments):
    Journal.write = write
    write(*arguments)
    os.kill(os.getpid(), int(sys.argv[1]))

Journal.write = interrupted
sys.exit(main(sys.argv[2:]))
"""


def interrupted(number: signal.Signals, *arguments: object) -> int:
    """Run a command that is sent a signal in the middle; its exit code."""
    command = [sys.executable, "-c", INTERRUPTED, str(int(number)), *map(str, arguments)]
    return subprocess.run(command, cwd="/", capture_output=True, timeout=PATIENCE, check=False).returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_verify_goes_on_where_it_was_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.png").write_bytes(encode(photo(64, 64, i % 7), "PNG"))
    (folder / "0.png").write_bytes(GOOD[:700])
    arguments = ("data", "verify", folder, "--out", tmp_path / "out", "--workers", 1)
    code = interrupted(number, *arguments)
    (tmp_path / "out" / ".journal.train.lut.x1").touch()  # what a kill in the middle of a listing leaves
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else STOPPED)
    found = result(*arguments)
    assert 0 < found["resumed_at"] < 200
    assert (found["usable"], found["quarantined"]) == (199, 1)
    assert not list((tmp_path / "out").glob("*journal*"))
    assert [Path(line["name"]).name for line in lines(tmp_path / "out" / "quarantine.jsonl")] == ["0.png"]


def test_pack_index_and_stats(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed = result("data", "pack", photos, out, "--shard-size", "40kB", "--shorter-side", 32, "--workers", 2)
    assert (packed["samples"], packed["complete"]) == (42, True)
    assert packed["shards"] > 1
    checked = result("data", "index", out, "--check")
    assert checked["problems"] == []
    written = result("data", "index", out, "--wds2idx")
    assert (len(written["files"]), written["samples"]) == (packed["shards"], 42)
    (out / "index.lut").unlink()
    assert len(open_source(out)) == 42  # through the .idx files
    assert result("data", "index", out, "--workers", 1)["samples"] == 42
    shard = out / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[0:9] = b"renamed!!"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    shard.write_bytes(data)
    differs = lut_ds("data", "index", out, "--check")
    assert differs.returncode == BAD_INPUT
    assert "shard-000001.tar: byte 512: renamed!!" in differs.stdout
    stats = result("data", "stats", out, "--sample", 20, "--out", tmp_path / "stats")
    assert stats["splits"]["train"]["measured"] == 20
    assert all(Path(path).stat().st_size > 1000 for path in stats["histograms"])


def test_index_of_a_folder_is_checked(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", 6)
    assert result("data", "index", tmp_path / "data")["samples"] == 6
    assert result("data", "index", tmp_path / "data", "--check")["problems"] == []
    (tmp_path / "data" / "class0" / "0000.jpg").rename(tmp_path / "data" / "class0" / "new.jpg")
    differs = lut_ds("data", "index", tmp_path / "data", "--check", "--json")
    assert differs.returncode == BAD_INPUT
    assert json.loads(differs.stdout)["problems"] == [
        f"{tmp_path}/data/class0/0000.jpg: no such file",
        f"{tmp_path}/data/class0/new.jpg: not in the index",
    ]


def test_the_index_of_a_selection_is_checked_for_what_it_has(tmp_path: Path) -> None:
    """Of a list, a pattern or a verification: that there is more below its root is no difference."""
    source = ImageFolder(write_folder(tmp_path / "data", 6))
    write_subset(tmp_path / "clean" / "index.lut", source, np.arange(6) > 0)
    assert check(str(tmp_path / "clean"), "train", 1)[0] == []  # the root of such an index is /
    Path(source.name(5)).unlink()
    assert check(str(tmp_path / "clean"), "train", 1)[0] == [f"{source.name(5)}: no such file"]
    for name in ("train-0.tar", "val-0.tar"):
        write_tar(tmp_path / name, [("0.jpg", b"data")])
    index(str(tmp_path / "train-*.tar"), tmp_path / "train.lut", "train", 1)
    assert check(str(tmp_path / "train.lut"), "train", 1)[0] == []


def test_the_index_of_a_selection_of_shards_is_checked_for_what_it_has(tmp_path: Path) -> None:
    """A verification quarantines one sample of three: the clean index leaves it out, and is right."""
    good = encode(photo(40, 40))
    members = [("0.jpg", good), ("1.jpg", good[:300]), ("2.jpg", encode(photo(48, 40)))]
    (tmp_path / "a").mkdir()
    write_tar(tmp_path / "a" / "0.tar", members)
    write_index(tmp_path / "a")
    assert verify(str(tmp_path / "a"), tmp_path / "out", workers=1)["quarantined"] == 1
    clean = str(tmp_path / "out" / "clean")
    assert check(clean, "train", 1) == ([], f"{clean}/index.lut: 2 samples, as the data have them")
    write_tar(tmp_path / "a" / "0.tar", [*members[:2], ("2.jpg", good)])
    (problem,) = check(clean, "train", 1)[0]
    assert problem.startswith(f"{tmp_path}/a/0.tar: byte ")
    assert ": 2.jpg, " in problem


def test_names_that_are_not_unicode_are_printed_as_they_are(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 2).rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    done = subprocess.run([sys.executable, "-m", "lut_ds", "data", "index", folder], capture_output=True, check=True)
    assert os.fsencode(folder) in done.stdout


@pytest.mark.slow
def test_show(digits: Path, tmp_path: Path) -> None:
    shown = result("data", "show", "demo", f"data.path={digits}", "-n", 2, "-o", tmp_path / "sheet.png")
    assert len(shown["samples"]) == 2
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["verify", "/nowhere/at/all"], "/nowhere/at/all"),
        (["verify"], "required: path"),
        (["verify", "/tmp", "--workers", "0"], "--workers: expected a whole number from 1, found '0'"),
        (["pack", "/tmp", "x", "--quality", "101"], "--quality"),
        (["pack", "/tmp", "x", "--shard-size", "huge"], "expected bytes, such as 500000, 300MB or 1GiB, found 'huge'"),
        (["stats", ""], "found an empty path"),
        (["index", "/tmp", "--check", "-o", "x.lut"], "-o/--output: expected without --check"),
        (["pack", "/tmp", "x", "--shard-size", "1GB", "--samples-per-shard", "5"], "not allowed with"),
        (["index", "/nowhere/at/all"], "/nowhere/at/all"),
        (["stats", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], named: str) -> None:
    assert named in refused("data", *arguments)


def test_results_that_cannot_be_written_are_refused_first(photos: Path) -> None:
    path, nowhere = str(photos), Path("/dev/null/x")
    for work in (
        lambda: verify(path, nowhere, workers=1),
        lambda: pack(path, nowhere, Options()),
        lambda: show_views(load_recipe("demo", [f"data.path={path}"]), 1, nowhere / "sheet.png"),
    ):
        with pytest.raises(UserError, match="/dev/null/x: expected a folder that can be written, found: Not a dir"):
            work()
    assert "/dev/null/x: expected a folder" in refused("data", "stats", path, "--out", nowhere)


def test_done_is_zero_and_speaks_to_people(photos: Path, tmp_path: Path) -> None:
    done = lut_ds("data", "verify", photos, "--out", tmp_path / "out")
    assert done.returncode == DONE
    assert done.stdout.splitlines()[0].startswith("42 samples, ")
    assert done.stdout.splitlines()[-1] == f"clean index: data.path={tmp_path}/out/clean"
