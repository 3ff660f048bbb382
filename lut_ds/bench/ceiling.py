"""What a step's speed is held against: the device's peak by its data sheet, and the fastest matrix product measured on it."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from lut_kernels import linear

from lut_ds.bench.planner.devices import DEVICES
from lut_ds.bench.rounds import Figures, run_apart
from lut_ds.engine.launch import discover_ranks

SIDES = {"cuda": 8192, "cpu": 1024}
_SETS = 3  # inputs in rotation, so that no cache answers for the memory
_REPEATS = 9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Product:
    """What to measure: the precision, as of a recipe, and torch's threads on a CPU (0: its default)."""

    precision: str
    threads: int = 0


def peak_flops(gpu: str | None, precision: str) -> float | None:
    """Dense FLOP/s of the data sheet in that precision (fp32: without tensor cores); None for a device that is not known."""
    known = next((device for device in DEVICES.values() if gpu is not None and device.name in gpu), None)
    if known is None:
        return None
    return known.peak_fp32 if precision == "fp32" else known.peak


def add_utilisation(figures: Figures, flops: float, peak: float | None, ceiling: float) -> None:
    """Add `mfu`, where a peak is known, and `of_ceiling` to `images_per_s`.

    Both count the published method's FLOPs an image, not what an implementation executes. `peak`, `ceiling`: FLOP/s of all
    devices together.
    """
    done = figures["images_per_s"] * flops
    if peak is not None:
        figures["mfu"] = done / peak
    figures["of_ceiling"] = done / ceiling


def matmul_ceiling(precision: str, threads: int) -> float:
    """FLOP/s of the fastest large square product here, measured in a process of its own."""
    return run_apart("lut_ds.bench.ceiling", Product(precision, threads), f"matrix product in {precision}")[
        "flops_per_s"
    ]


def measure(product: Product) -> Figures:
    """`flops_per_s` of random n x n x n products, the faster of the library's and ours; medians."""
    if product.threads:
        torch.set_num_threads(product.threads)
    device, dtype = discover_ranks().device, DTYPES[product.precision]
    side = SIDES[device.type]
    with torch.no_grad():
        sets = [[torch.randn(side, side, device=device).to(dtype) for _ in "ab"] for _ in range(_SETS)]
        sides = (F.linear,) if device.type == "cuda" else (F.linear, linear)
        seconds = min(_seconds(call, sets, device) for call in sides)
    return {"flops_per_s": 2.0 * side**3 / seconds}


def _seconds(call: Callable[..., torch.Tensor], sets: list[list[torch.Tensor]], device: torch.device) -> float:
    times = []
    for number in range(_REPEATS + _SETS):
        began = time.perf_counter()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            call(*sets[number % _SETS])
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) / 1e3)
        else:
            call(*sets[number % _SETS])
            times.append(time.perf_counter() - began)
    return median(times[_SETS:])


def main() -> None:
    """Read a task from standard input, measure, print the result as the last line of standard output."""
    print(json.dumps(measure(Product(**json.load(sys.stdin)))), flush=True)


if __name__ == "__main__":
    main()
