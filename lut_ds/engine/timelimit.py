"""When this process will be ended by its job's time limit: from Slurm, or as the recipe says."""

import os
import subprocess
import time
from collections.abc import Mapping

import psutil

from lut_ds.durations import seconds_of


def end_time(limit: str | None, env: Mapping[str, str] = os.environ) -> float | None:
    """Seconds since the epoch at which the process will be ended; None if nothing says so.

    Args:
        limit: `auto` asks Slurm about the job this process is in, if it is in one; a duration counts from the start of
            this process; None knows no limit.
        env: where Slurm's variables are.
    """
    if limit is None:
        return None
    if limit == "auto":
        return _slurm_end(env) if "SLURM_JOB_ID" in env else None
    seconds = seconds_of(limit)
    assert seconds is not None, limit  # the recipe was validated
    return psutil.Process().create_time() + seconds


def _slurm_end(env: Mapping[str, str]) -> float | None:
    """SLURM_JOB_END_TIME where this Slurm sets it (22.05 does not for every step), else what squeue says is left."""
    stated = env.get("SLURM_JOB_END_TIME", "")
    if stated.isascii() and stated.isdigit() and int(stated) > 0:
        return float(stated)
    command = ["squeue", "--noheader", "--jobs", env["SLURM_JOB_ID"], "--format", "%L"]
    try:
        left = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):  # a container without Slurm's commands, or a busy controller
        return None
    seconds = seconds_of(left)
    return None if seconds is None else time.time() + seconds
