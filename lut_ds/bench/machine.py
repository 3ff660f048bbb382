"""What a number was measured on: every benchmark's result carries this beside it."""

import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lut_ds.engine.runfolder import git_state, package_versions


def describe_machine() -> dict[str, Any]:
    """Hardware, versions, command and date, as JSON values.

    `cores` are those this process may use; `gpu` is null where torch finds none.
    """
    return {
        "command": shlex.join(["lut-ds", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "git": git_state(Path(__file__).parent),
    }


def cpu_model() -> str:
    """The processor's name, with its instruction set as torch sees it."""
    capability = torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()} ({capability})"
