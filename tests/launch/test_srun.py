"""The same command under a real srun: two nodes of a throw-away Slurm cluster, one CPU rank each."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lut_ds.tracking import read_metrics
from tests.engine.launching import ROOT
from tests.engine.test_resume import command, write_recipe

SLURM = [
    tool
    for tool in ("slurmctld", "slurmd", "srun", "ip", "unshare")
    if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
]


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.skipif(
    len(SLURM) < 5, reason="Slurm is not installed: apt-get install slurmctld slurmd slurm-client iproute2"
)
def test_srun_maps_its_tasks_to_ranks(digits: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, digits, tmp_path / "run", deepspeed="zero1")
    srun = ["srun", "-N2", "-n2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    started = subprocess.run(
        [
            "bash",
            str(ROOT / "launch" / "local_slurm.sh"),
            str(tmp_path / "cluster"),
            *srun,
            *command(recipe, "train.max_steps=2"),
        ],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD"))},
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert started.returncode == 0, started.stderr[-3000:]
    assert json.loads(started.stdout)["step"] == 2
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    starts = (tmp_path / "run" / "environment.jsonl").read_text().splitlines()
    assert json.loads(starts[0])["host"] == "node1"
