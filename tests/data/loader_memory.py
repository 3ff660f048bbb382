"""Resident memory of a loader over many batches; prints one JSON object. Usage: loader_memory.py FOLDER BATCHES

Some files of FOLDER may be bad: the repair of their batches is measured too.
"""

import gc
import json
import sys
import time

import numpy as np
import psutil
import torch

from lut_ds.data.loader import PretrainLoader
from lut_ds.data.sources import ImageFolder
from lut_ds.data.views import LUT_VIEW1, LUT_VIEW2

MICRO_BATCH = 4


def measure(folder: str, batches: int) -> dict[str, float]:
    """RSS (MB) twenty times over the run; its slope by least squares over the last three quarters, bytes a batch.

    `steady_bytes_per_batch` is the least of these quarters' own slopes: what an allocator takes once is in one of them alone.
    """
    process, every = psutil.Process(), max(1, batches // 20)
    source = ImageFolder(folder)
    rss, started, cpu = [], time.monotonic(), time.process_time()
    with PretrainLoader(
        source, [LUT_VIEW1, LUT_VIEW2], image_size=16, num_patches=4, seed=0, global_batch=MICRO_BATCH,
        micro_batch=MICRO_BATCH, rank=0, world_size=1, device=torch.device("cpu"), threads=2,
    ) as loader:  # fmt: skip
        for done, _ in enumerate(loader.batches(0, batches), start=1):
            if done % every == 0:
                gc.collect()
                rss.append((done, process.memory_info().rss))
        replaced = loader.bad
    warm = np.array(rss[len(rss) // 4 :], np.float64)
    slope, *each = (float(np.polyfit(part[:, 0], part[:, 1], 1)[0]) for part in (warm, *np.array_split(warm, 3)))
    return {
        "batches": batches,
        "micro_batch": MICRO_BATCH,
        "replaced": replaced,
        "rss_mb": [round(value / 2**20, 1) for _, value in rss],
        "slope_bytes_per_batch": round(slope, 1),
        "steady_bytes_per_batch": round(min(each), 1),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
