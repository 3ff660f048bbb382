"""Times of the operators on a CPU, and of both ways to do attention there: what the `cpu` rules of the table rest on.

python benchmarks/kernels_cpu.py [--images 16] [--repeats 10]     writes benchmarks/kernels_cpu.json

CPU time of one thread, the least of the repeats, sides in rotation: other load on the machine then disturbs little.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lut_kernels import choice
from lut_kernels.bench_work import MODELS, Inputs, Work, step_work


def side_calls(work: Work, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Forward (and backward where the work has leaves) by side; attention only by the sides a CPU has."""
    inputs: Inputs = work.make("cpu", dtype, 0)
    leaves = [inputs[name].requires_grad_() for name in work.leaves]
    upstream = torch.ones_like(work.call(inputs))

    def once(side: Callable[[Inputs], torch.Tensor]) -> object:
        with torch.set_grad_enabled(bool(leaves)):
            out = side(inputs)
        return torch.autograd.grad(out, leaves, upstream) if leaves else out

    names = ("sdpa", "plain") if work.op == "attention" else tuple(work.library)
    return {name: lambda side=work.library[name]: once(side) for name in names}


def least_ms(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least CPU milliseconds of each side over the repeats."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):  # one more: the first warms up, and is hardly ever the least
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name] = min(found[name], (time.process_time() - start) * 1e3)
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Measure ViT-S and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        for work in step_work(options.images, MODELS[:1]):
            sides = least_ms(side_calls(work, dtype), options.repeats)
            shape = (work.tokens, work.head_dim) if work.op == "attention" else ()
            record = {"name": work.name, "dtype": str(dtype).removeprefix("torch."), "least_ms": sides}
            record["chosen"] = choice(work.op, "cpu", dtype, *shape, training=bool(work.leaves))
            times.append(record)
            print(record)
    report = {
        "command": f"python benchmarks/kernels_cpu.py --images {options.images}",
        "torch": torch.__version__, "machine": platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "times": times,
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
