"""A throw-away Slurm cluster that a whole test module shares, and what its tests ask it."""

import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lut_ds.tracking import read_metrics
from tests.engine.launching import PATIENCE, ROOT

TOOLS = ("slurmctld", "slurmd", "srun", "ip", "unshare")
MISSING = [tool for tool in TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
WHY = f"Slurm is not installed ({', '.join(MISSING)} missing): apt-get install slurmctld slurmd slurm-client munge iproute2"
LAUNCHER_VARIABLES = ("SLURM", "SBATCH", "SRUN", "RANK", "WORLD", "LOCAL_RANK", "MASTER_", "LUT_DS_")

# An urgent queue whose jobs preempt those of `main`: told by their signal, 30 s to save, then requeued.
PREEMPTION = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=spare Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class Cluster:
    """The cluster's shell: commands run inside it, on the machine of its controller."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
        self._shell = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "local_slurm.sh"), str(folder / "slurm"), "bash", "-s"],
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": "1", "NODES": str(nodes), "SLURM_EXTRA": PREEMPTION},
            stdin=subprocess.PIPE,
            stdout=(folder / "cluster.log").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.run("sinfo")

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside; fails with what it printed unless it exits 0 or `check` is off."""
        base = self.folder / f"command-{next(self._numbers):05d}"
        line = shlex.join(map(str, command))
        assert self._shell.stdin is not None
        self._shell.stdin.write(
            f"({line}) >{base}.out 2>{base}.err </dev/null; echo $? >{base}.tmp; mv {base}.tmp {base}.code\n"
        )
        self._shell.stdin.flush()
        self.until(Path(f"{base}.code").exists, line)
        done = subprocess.CompletedProcess(
            list(map(str, command)),
            int(Path(f"{base}.code").read_text()),
            Path(f"{base}.out").read_text(),
            Path(f"{base}.err").read_text(),
        )
        assert not check or done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done

    def lut_ds(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `lut-ds` on the controller's machine, as on a login node."""
        return self.run(sys.executable, "-m", "lut_ds", *arguments, check=check)

    def until(self, true: Callable[[], Any], what: str, every: float = 0.05) -> None:
        """Wait for a condition, looked at `every` so many seconds."""
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert self._shell.poll() is None, "the cluster ended: " + (self.folder / "cluster.log").read_text()[-3000:]
            assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for: {what}\n{self.logs()}"
            time.sleep(every)

    def field(self, job: object, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "-o", job).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)[name]

    def wait_for(self, job: object, *states: str) -> str:
        """Wait until a job is in one of the states; returns it."""
        found: list[str] = []

        def reached() -> bool:
            found.append(self.field(job, "JobState"))
            return found[-1] in states

        # Each look starts processes, on the cores that the ranks need.
        self.until(reached, f"job {job} in {states}", every=0.4)
        return found[-1]

    def wait_for_steps(self, run: Path, count: int) -> None:
        """Wait until a run has recorded so many steps."""
        self.until(lambda: len(read_metrics(run / "metrics.jsonl")) >= count, f"{count} steps recorded in {run}")

    def processes(self, words: str) -> list[str]:
        """Command lines, whole however narrow COLUMNS is, of the processes on all nodes that contain `words`; zombies too."""
        shown = self.run("ps", "-ww", "-eo", "stat=,args=").stdout.splitlines()
        return [line for line in shown if words in line or (line.startswith("Z") and "python" in line)]

    def logs(self) -> str:
        """The last lines of every job's output."""
        files = sorted(self.folder.rglob("slurm-*.out"))
        return "\n".join(f"== {file}\n" + file.read_text(errors="replace")[-2500:] for file in files)

    def close(self) -> None:
        """End the cluster and everything on it."""
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        try:
            self._shell.wait(timeout=PATIENCE)
        finally:
            self._shell.kill()
            self._shell.wait()
