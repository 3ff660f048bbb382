"""The index at 100 million samples: `python benchmarks/data_index.py [--samples N] [--folder DIR]` writes data_index.json.

Every record and name is written (nothing sparse); the names are 20 bytes, numbered. Opening, reading and memory are measured
in fresh processes, several at once, as ranks of one machine. Needs 4.5 GB of disk and 3 minutes for 100 million.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lut_ds.data.index import Kind
from lut_ds.data.index_writer import IndexWriter

READER = """
import json, sys, time
import numpy as np
from pathlib import Path
from lut_ds.data.index import SampleIndex
def memory():
    kept = ("Rss", "Pss", "Private_Dirty")
    rows = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {key: int(rows[key].split()[0]) / 1024 for key in kept}
before, began = memory(), time.perf_counter()
index = SampleIndex(sys.argv[1])
opened = time.perf_counter() - began
opened_memory = memory()
total = int(index.labels().sum(dtype=np.int64))  # touches every record
picks = np.random.default_rng(int(sys.argv[2])).integers(0, len(index), 100_000).tolist()
began = time.perf_counter()
for i in picks:
    index.place(i)
places = (time.perf_counter() - began) / len(picks)
print(json.dumps({"open_s": opened, "place_us": places * 1e6, "before_mb": before, "opened_mb": opened_memory,
    "all_records_touched_mb": memory(), "labels": total}), flush=True)
sys.stdin.read()  # the map stays while the others are measured
"""


OPENER = """
import sys, time
from lut_ds.data.index import SampleIndex
began = time.perf_counter()
index = SampleIndex(sys.argv[1])
index.entry(len(index) // 2)
print(time.perf_counter() - began)
"""


def write(path: Path, kind: Kind, samples: int) -> float:
    """Write `samples` of 100 kB each, 10,000 a shard; returns seconds."""
    began, per_shard = time.perf_counter(), 10_000
    with IndexWriter(path, kind) as writer:
        for start in range(0, samples, per_shard):
            count = min(per_shard, samples - start)
            shard = writer.add_shard(f"{start // per_shard:06d}.tar", count * 102_400, time.time_ns())
            names = b"".join(b"n%015d.jpg" % i for i in range(start, start + count))
            rows = np.arange(count)
            writer.extend(names, np.full(count, 20), shard, 100_000, (start + rows) % 1000, 512 + 102_400 * rows)
        writer.finish([str(i) for i in range(1000)])
    return time.perf_counter() - began


def read(path: Path, ranks: int) -> dict[str, object]:
    """What each of `ranks` processes measures, and what the page cache holds while all of them hold the index."""
    command = [sys.executable, "-c", READER, str(path)]
    running = [
        subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    rows = [json.loads(process.stdout.readline()) for process in running if process.stdout]
    found = {"ranks": rows, "page_cache_mb_all_records_touched": resident(path)}
    for process in running:
        process.communicate()
    return found


def resident(path: Path) -> float:
    """MB of the file that the page cache holds."""
    found = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", path], capture_output=True, text=True, check=True
    )
    return int(found.stdout) / 2**20


def cold(path: Path) -> float:
    """Seconds to open the index after its pages were dropped from the cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return float(
        subprocess.run([sys.executable, "-c", OPENER, path], check=True, capture_output=True, text=True).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    kinds = {}
    for kind in ("tar", "files"):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / "index.lut"
            written = write(path, kind, args.samples)
            kinds[kind] = {"file_gb": path.stat().st_size / 1e9, "write_s": written}
            kinds[kind] |= {"open_cold_s": cold(path), "page_cache_mb_after_cold_open": resident(path)}
            kinds[kind] |= read(path, 4)
    result = {
        "command": f"python benchmarks/data_index.py --samples {args.samples}",
        "samples": args.samples,
        **kinds,
        "hardware": f"{os.cpu_count()} cores shared with other work, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {"numpy": np.__version__, "python": platform.python_version()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
