"""fp32 products of a ViT-S and its decoder on one CPU thread: MKL, which torch takes, against oneDNN, which it ships too.

python benchmarks/linear_cpu.py [--repeats 10]     writes benchmarks/linear_cpu.json

CPU time, the least of the repeats, sides in turn: other load on the machine then disturbs little.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lut_kernels.linear import linear_side

from lut_ds.bench.machine import describe_machine

SHAPES = (
    (3152, 384, 1152),
    (3152, 384, 384),
    (3152, 384, 1536),
    (3152, 1536, 384),
    (1600, 384, 1536),
    (3152, 512, 2048),
)


def least_seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least CPU seconds of each side."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            found[name] = min(found[name], time.process_time() - began)
    return found


def measure(rows: int, inputs: int, outputs: int, repeats: int) -> dict[str, object]:
    """GFLOP/s of forward, input gradient and weight gradient of one layer."""
    x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    products = {
        "forward": (x, weight, lambda: x @ weight.t()),
        "input gradient": (grad, weight.t(), lambda: grad @ weight),
        "weight gradient": (grad.t(), x.t(), lambda: grad.t() @ x),
    }
    onednn = torch.ops.lut_kernels.linear
    result: dict[str, object] = {"rows": rows, "inputs": inputs, "outputs": outputs}
    for name, (left, right, mkl) in products.items():
        calls = {"mkl": mkl, "onednn": lambda left=left, right=right: onednn(left, right, None)}
        seconds = least_seconds(calls, repeats)
        result[name] = {side: round(2e-9 * rows * inputs * outputs / s, 1) for side, s in seconds.items()}
    return result


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gflops = [measure(*shape, options.repeats) for shape in SHAPES]
    for record in gflops:
        print(record)
    machine = describe_machine() | {"command": f"python benchmarks/linear_cpu.py --repeats {options.repeats}"}
    report = {"machine": machine, "chosen": linear_side("cpu", torch.float32), "gflop_per_s": gflops}
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
