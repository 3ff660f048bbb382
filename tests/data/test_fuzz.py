"""Thousands of damaged files through the loader, in a process of its own: none crashes it, and it names each bad one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lut_ds.data.pipeline import decode_each
from lut_ds.data.sources import ImageFolder
from lut_ds.data.validity import image_hw
from lut_ds.errors import RunFault
from tests.data.mutations import bombs, mutants, seeds, strangers
from tests.engine.launching import PATIENCE, ROOT

GROWTH_MB = 400  # what the largest valid image, its batch and the pipeline may take

PROGRAM = """
import hashlib, json, pathlib, sys
from lut_ds.data.loader import EvalLoader
from lut_ds.data.sources import ImageFolder

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now

source = ImageFolder(sys.argv[1])
evaluation = EvalLoader(source, 24, int(sys.argv[2]), int(sys.argv[3]), skip_bad=True)
before, digest, kept = peak(), hashlib.sha256(), 0
for views, labels in evaluation:
    digest.update(views.numpy().tobytes())
    kept += len(views)
print(json.dumps({
    "kept": kept, "digest": digest.hexdigest(), "grown": peak() - before,
    "bad": {source.name(b.sample): b.reason for b in evaluation.bad},
}))
"""


def write(root: Path, count: int) -> ImageFolder:
    kinds = {"bomb": bombs(), "stranger": strangers(), "good": seeds()}
    files = {f"{kind}.{name}": data for kind, group in kinds.items() for name, data in group.items()}
    for name, data in [*mutants(count), *files.items()]:
        (root / name).write_bytes(data)
    return ImageFolder(root)


def load(root: Path, batch: int, threads: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root), str(batch), str(threads)],
        cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=2 * PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout)


def undecodable_alone(source: ImageFolder) -> set[str]:
    """Names of the files that have no acceptable header, or that the decoder refuses when given nothing else."""
    bad, headed = set(), {}
    for i in range(len(source)):
        data = source.read(i)
        try:
            headed[source.name(i)] = data, image_hw(data, "")
        except RunFault:
            bad.add(source.name(i))
    for (name, (_, hw)), found in zip(headed.items(), decode_each(data for data, _ in headed.values())):
        if isinstance(found, RuntimeError) or found.shape[:2] != hw:
            bad.add(name)
    return bad


@pytest.mark.parametrize("count", [200, pytest.param(6000, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path: Path, count: int) -> None:
    source = write(tmp_path, count)
    found = load(tmp_path, 64, 3)  # from 32 on, the decoder reads headers in parallel
    bad = set(found["bad"])
    assert bad == undecodable_alone(source)
    assert found["kept"] == len(source) - len(bad)
    assert 0.4 * count < len(bad) < 0.8 * count  # the mutations are neither all harmless nor all fatal
    assert {Path(name).name for name in bad} >= {f"stranger.{name}" for name in strangers()}
    assert {Path(name).name for name in bad} >= {f"bomb.{name}" for name in bombs()}
    assert not any(Path(name).name.startswith("good.") for name in bad)
    assert all(reason and "\n" not in reason for reason in found["bad"].values())
    assert found["grown"] < GROWTH_MB
    again = load(tmp_path, 24, 1)
    assert (again["bad"].keys(), again["digest"]) == (found["bad"].keys(), found["digest"])


def test_names_that_lie(tmp_path: Path) -> None:
    """A folder called like an image, a link to nothing, and good images under wrong extensions."""
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone")
    good = seeds()
    (tmp_path / "really_png.jpg").write_bytes(good["png"])
    (tmp_path / "really_jpg.png").write_bytes(good["jpg"])
    found = load(tmp_path, 64, 1)
    assert found["kept"] == 2
    assert [Path(name).name for name in found["bad"]] == ["nowhere.jpg"]
