"""Host memory of a training process on CPUs: what a step frees, the next one gets again without asking the system."""

import ctypes

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
