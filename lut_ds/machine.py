"""What this machine gives a process."""

import contextlib
from pathlib import Path


def memory_limit() -> int:
    """Bytes of memory that the machine, or the control group around this process, has."""
    import psutil

    limit = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max" in it
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return limit
