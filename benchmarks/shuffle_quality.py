"""Quality of data.shuffle: `python benchmarks/shuffle_quality.py` writes shuffle_quality.json beside it (CPU, a minute)."""

import json
import platform
import time
from pathlib import Path

import numpy as np

from lut_ds.bench.shuffle import shuffle_quality
from lut_ds.data.order import BlockOrder, SampleOrder

N, CLASSES, BATCH = 1_281_167, 1000, 4096  # ImageNet
BLOCKS = [(256, 256), (1024, 64), (1024, 256), (64, 1024)]


def main() -> None:
    orders = {"global": SampleOrder(N, 0)}
    orders |= {f"blocks, block {b}, window {w}": BlockOrder(N, 0, b, w) for b, w in BLOCKS}
    rows = {name: shuffle_quality(order, CLASSES, BATCH) for name, order in orders.items()}
    result = {
        "command": "python benchmarks/shuffle_quality.py",
        "what": f"{N} samples sorted by {CLASSES} classes, batches of {BATCH}; see lut_ds/bench/shuffle.py for the columns",
        "hardware": "any: what is read depends on none",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {"numpy": np.__version__, "python": platform.python_version()},
        "orders": {name: {key: round(value, 4) for key, value in row.items()} for name, row in rows.items()},
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
