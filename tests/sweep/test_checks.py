"""What a sweep says of its runs before it trains any."""

import shutil
from pathlib import Path

from lut_ds.engine.sweepfile import read_sweep
from lut_ds.sweep.checks import check_sweep
from tests.data.images import write_folder
from tests.engine.test_sweepstate import begin, entry


def test_images_that_are_gone_are_one_line(tmp_path: Path) -> None:
    """However many runs began on them."""
    data = write_folder(tmp_path / "data", 24)
    for split in ("train", "val"):
        shutil.copytree(data, tmp_path / "moved" / split)
    entry(tmp_path)
    (tmp_path / "s.yaml").write_text("recipe: base.yaml\nruns: {a: {}}\nseeds: [0, 1, 2]\n")
    for run in read_sweep(tmp_path / "s.yaml", tmp_path / "out", ["data.path=gone"]).entries:
        begin(run)
    said: list[str] = []
    moved = f"data.path={tmp_path / 'moved'}"
    check_sweep(read_sweep(tmp_path / "s.yaml", tmp_path / "out", [moved]), said.append)
    assert said == [f"3 runs: began on gone, where there are no images now; taken to be those of {tmp_path / 'moved'}"]
