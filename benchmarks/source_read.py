"""Reading a folder and tar shards of the same files: `python benchmarks/source_read.py DIR` writes source_read.json.

DIR holds an image folder (as ImageNet's); its files are packed into shards and read at random and block order, with the page
cache dropped for these files before each cold pass. What a virtual disk does below that is not known here.
"""

import argparse
import io
import json
import os
import platform
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lut_ds.data.folder import ImageFolder
from lut_ds.data.order import BlockOrder, Order, SampleOrder
from lut_ds.data.shards import TarShards
from lut_ds.data.sources import Source, index_source, open_source

CHUNK, SHARD = 16, 1000


def pack(source: ImageFolder, root: Path) -> list[Path]:
    """Shards of 1,000 files in the folder's order."""
    shards = []
    for start in range(0, len(source), SHARD):
        shards.append(root / f"{start // SHARD:06d}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for i in range(start, min(start + SHARD, len(source))):
                data = source.read(i)
                info = tarfile.TarInfo(f"{i:09d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index_source(root)
    return shards


def drop(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def advise(source: Source, samples: list[int]) -> None:
    """Tell the kernel about all samples of a chunk before the first is read."""
    assert isinstance(source, TarShards)
    for i in samples:
        offset, size, _, shard = source.index.place(i)
        with source._descriptors.use(shard) as fd:
            os.posix_fadvise(fd, offset - 512, size + 512, os.POSIX_FADV_WILLNEED)


def rate(
    source: Source, order: Order, threads: int, before: Callable[[Source, list[int]], None] | None = None
) -> dict[str, float]:
    """Read one epoch in chunks of 16 by `threads`."""

    def read(start: int) -> int:
        samples = order.samples(0, np.arange(start, min(start + CHUNK, len(source)))).tolist()
        if before is not None:
            before(source, samples)
        return sum(len(source.read(i)) for i in samples)

    began, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, range(0, len(source), CHUNK)))
    seconds = time.perf_counter() - began
    used = time.process_time() - cpu
    return {
        "files_per_s": len(source) / seconds,
        "mb_per_s": total / seconds / 1e6,
        "cpu_us_per_file": used / len(source) * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.path.parent) as folder:
        files = ImageFolder(args.path)
        shards = pack(files, Path(folder))
        packed = open_source(folder)
        paths = [Path(files.name(i)) for i in range(len(files))]
        random, blocks = SampleOrder(len(files), 0), BlockOrder(len(files), 0, 256, 4)
        runs: dict[str, tuple[Source, list[Path], Order, Callable[[Source, list[int]], None] | None]] = {
            "folder, global": (files, paths, random, None),
            "shards, global": (packed, shards, random, None),
            "shards, global, WILLNEED": (packed, shards, random, advise),
            "folder, blocks": (files, paths, blocks, None),
            "shards, blocks": (packed, shards, blocks, None),
            "shards, blocks, WILLNEED": (packed, shards, blocks, advise),
        }
        rows: dict[str, dict[str, list[float]]] = {}
        for _ in range(3):
            for name, (source, cached, order, before) in runs.items():
                drop(cached)
                for state in ("cold", "warm"):
                    found = rate(source, order, args.threads, before)
                    for key, value in found.items():
                        rows.setdefault(f"{name}, {state}", {}).setdefault(key, []).append(round(value, 1))
    result = {
        "command": f"python benchmarks/source_read.py DIR --threads {args.threads}",
        "files": len(files),
        "mean_kb": round(sum(path.stat().st_size for path in paths) / len(paths) / 1e3, 1),
        "threads": args.threads,
        "three_passes": rows,
        "hardware": f"{os.cpu_count()} cores shared with other work, virtual disk, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {"numpy": np.__version__, "python": platform.python_version()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
