"""When this process will be ended by its job's time limit: from Slurm, or as the recipe says."""

import math
import os
import subprocess
import time
from collections.abc import Mapping

import psutil

from lut_ds.durations import seconds_of


def end_time(limit: str | None, env: Mapping[str, str] = os.environ, again: bool = False) -> float | None:
    """Seconds since the epoch at which the process will be ended; None if nothing says so.

    Args:
        limit: `auto` asks Slurm about the job this process is in, if it is in one; a duration counts from the start of
            this process; None knows no limit.
        env: where Slurm's variables are.
        again: ask anew what may have changed since the job started, as `scontrol update timelimit=` sets no variable;
            infinite if the job has no limit any more.
    """
    if limit is None:
        return None
    if limit == "auto":
        return _slurm_end(env, again) if "SLURM_JOB_ID" in env else None
    seconds = seconds_of(limit)
    assert seconds is not None, limit  # the recipe was validated
    return psutil.Process().create_time() + seconds


def _slurm_end(env: Mapping[str, str], again: bool) -> float | None:
    """SLURM_JOB_END_TIME where this Slurm sets it (22.05 does not for every step), else what squeue says is left."""
    stated = env.get("SLURM_JOB_END_TIME", "")
    known = float(stated) if stated.isascii() and stated.isdigit() and int(stated) > 0 else None
    if known is not None and not again:
        return known
    job = env["SLURM_JOB_ID"]  # of one task of an array, the number of them all
    if "SLURM_ARRAY_TASK_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
    try:
        left = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):  # a container without Slurm's commands, or a busy controller
        return known
    seconds = seconds_of(left)
    if seconds is not None:
        return time.time() + seconds
    return math.inf if again and left.strip() == "UNLIMITED" else known
