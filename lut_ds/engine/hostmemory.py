"""Host memory of training on CPUs: whether a step fits, and that the next one gets what a step frees without asking the system."""

import ctypes
import os

from lut_ds.config import Recipe
from lut_ds.engine.ds_config import load_ds_config
from lut_ds.engine.launch import Ranks
from lut_ds.engine.memory import memory
from lut_ds.errors import UserError
from lut_ds.machine import memory_limit

_GIB = 2**30
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Let malloc keep large blocks that are freed, instead of giving them back and having every page of them cleared anew.

    glibc maps each block above 32 MB for itself and unmaps it when it is freed. A step allocates the same gigabytes as the
    one before; on a virtual machine, page faults for them were a seventh of a ViT-S step's CPU time. The process stays as
    large as its largest step.

    Returns:
        Whether this C library can do so; without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # No block is mapped on its own, and the end of the heap is not given back either (-1: no limit).
    return mallopt is not None and mallopt(_MMAP_MAX, 0) == 1 and mallopt(_TRIM_THRESHOLD, -1) == 1


def check_host_memory(recipe: Recipe, ranks: Ranks, micro_batch: int, accumulation: int) -> None:
    """Refuse a step on CPUs that the machine cannot hold: the system would kill it minutes later, without a word.

    Raises:
        UserError: what a step needs, what there is, and the largest micro-batch that fits.
    """
    if ranks.device.type != "cpu":
        return
    config, here = load_ds_config(recipe), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    images, limit = micro_batch * accumulation, memory_limit()

    def needed(size: int) -> float:
        return here * memory(recipe, config, ranks.world_size, size, images // size, "cpu").peak

    if needed(micro_batch) <= limit:
        return
    fitting = (size for size in range(micro_batch, 0, -1) if images % size == 0 and needed(size) <= limit)
    best = next(fitting, None)
    advice = f"add train.micro_batch={best}" if best else "train on GPUs or more machines, or a smaller model"
    raise UserError(
        f"train.micro_batch: {micro_batch} images on each of {here} ranks here need {needed(micro_batch) / _GIB:.1f} GiB of "
        f"memory, this machine has {limit / _GIB:.1f}; {advice}"
    )
