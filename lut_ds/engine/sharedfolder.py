"""Whether all ranks write, and see, one and the same folder: asked at the start, as the first save may be hours away."""

import platform
import time
from pathlib import Path

import torch.distributed as dist

from lut_ds.errors import UserError


def check_shared(folder: Path, rank: int, world_size: int, patience: float) -> None:
    """Let every rank write a file there, and rank 0 look for all of them. A collective.

    Args:
        patience: seconds that a network file system may take to show one node's files on another.

    Raises:
        UserError: on every rank, when one cannot write the folder or rank 0 does not see what it wrote.
    """
    probes = [folder / f".probe.{r}" for r in range(world_size)]
    problem = None
    try:
        probes[rank].touch()
    except OSError as error:
        problem = f"rank {rank} on {platform.node()} cannot write it: {error.strerror}"
    problems: list[str | None] = [None] * world_size
    dist.all_gather_object(problems, problem)
    if rank == 0 and not any(problems):
        hidden = _first_hidden(probes, patience)
        if hidden is not None:
            problems[0] = (
                f"what rank {hidden} wrote is not seen on {platform.node()}; it must be one folder for all nodes"
            )
    dist.broadcast_object_list(problems, src=0)
    first = next((p for p in problems if p), None)
    if first is not None:
        raise UserError(f"run.dir: {folder}: {first}; name another folder")
    probes[rank].unlink(missing_ok=True)


def _first_hidden(probes: list[Path], patience: float) -> int | None:
    deadline = time.monotonic() + patience
    for rank, path in enumerate(probes):
        while not path.exists():
            if time.monotonic() > deadline:
                return rank
            time.sleep(0.2)
    return None
