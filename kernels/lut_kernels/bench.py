"""One command on a GPU: parity, times against floors and library calls, tuning, and the dispatch table.

    python -m lut_kernels.bench                 everything; writes benchmarks/kernels_<arch>.json and the table
    python -m lut_kernels.bench --smoke         parity and one batch size, no tuning, the table is left alone
    python -m lut_kernels.bench --parity-only   what a memory checker is run on

Exit code: 0, 1 where parity or a memory check failed, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton

from lut_kernels.bench_parity import check_guards, check_work
from lut_kernels.bench_table import fastest_library, updated, without_spills, write
from lut_kernels.bench_time import Ceiling, ceiling, floor_us, time_sides, tune, tuned_work
from lut_kernels.bench_work import Work, parity_work, step_work, transfer_work
from lut_kernels.dispatch import TABLE_PATH, architecture, choice, forget_table, table
from lut_kernels.resources import SPACE_PATH
from lut_kernels.runtime import INTERPRETED

Record = dict[str, Any]
SANITIZER_SECONDS = 300  # the checker slows everything down many times


def run_parity(device: str, dtypes: tuple[torch.dtype, ...]) -> list[Record]:
    """Every kernel at small and odd shapes, in these dtypes."""
    found = [check_work(work, device, dtype) for dtype in dtypes for work in parity_work()]
    for record in found:
        if not record["passed"]:
            print(f"PARITY {record['name']} {record['dtype']}: {record['detail']}")
    print(f"parity: {sum(record['passed'] for record in found)} of {len(found)} passed")
    return found


def run_times(device: str, images: tuple[int, ...], dtypes: tuple[torch.dtype, ...], top: Ceiling) -> list[Record]:
    """Times of all sides at the shapes that matter."""
    found: list[Record] = []
    seen: set[tuple[str, torch.dtype]] = set()
    for count in images:
        for work in (*step_work(count), *transfer_work(min(count, 64))):
            for dtype in dtypes:
                if (work.name, dtype) in seen or (work.op != "attention" and dtype != torch.bfloat16):
                    continue
                seen.add((work.name, dtype))
                times = time_sides(work, device, dtype)
                found.append(
                    {
                        "op": work.op, "name": work.name, "dtype": str(dtype).removeprefix("torch."),
                        "tokens": work.tokens, "head_dim": work.head_dim, "training": bool(work.leaves),
                        "floor_us": floor_us(work, top), "times_us": times,
                    }
                )  # fmt: skip
    return found


def chosen(record: Record, device: torch.device) -> str:
    """The side the table in force would take for a measured shape."""
    shape = (record["tokens"], record["head_dim"]) if record["op"] == "attention" else ()
    return choice(record["op"], device, getattr(torch, record["dtype"]), *shape, training=record["training"])


def print_table(times: list[Record], device: torch.device) -> None:
    """Floor, kernel, best library call and choice, one shape a line."""
    print(f"{'shape':44} {'dtype':9} {'floor':>7} {'triton':>7} {'library':>16} {'of floor':>8}  chosen")
    for record in times:
        sides = record["times_us"]
        best = fastest_library(sides)
        side = chosen(record, device)
        share = record["floor_us"] / sides.get(side, sides[best])
        print(
            f"{record['name']:44} {record['dtype']:9} {record['floor_us']:7.1f} {sides['triton']:7.1f}"
            f" {best:>9} {sides[best]:6.1f} {share:8.0%}  {side}"
        )


def run_guards(device: str, todo: list[Work], dtype: torch.dtype) -> Record:
    """Every kernel in guarded memory: {passed, faults}."""
    faults = [fault for work in todo for fault in check_guards(work, device, dtype)]
    print("\n".join([*(f"MEMORY {fault}" for fault in faults), f"guard zones: {len(todo)} runs, {len(faults)} faults"]))
    return {"passed": not faults, "runs": len(todo), "faults": faults}


def run_sanitizer() -> Record:
    """The smoke parity under NVIDIA's memory checker: {passed, detail}; passed is None where it is not installed or too slow."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer: not installed, memory was checked with guard zones only")
        return {"passed": None, "detail": "not installed"}
    command = [tool, "--error-exitcode", "1", sys.executable, "-m", "lut_kernels.bench", "--parity-only", "--smoke"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"compute-sanitizer: stopped after {SANITIZER_SECONDS} s without a fault, not finished")
        return {"passed": None, "detail": f"not finished in {SANITIZER_SECONDS} s"}
    detail = "clean" if found.returncode == 0 else f"exit {found.returncode}: {found.stdout[-500:]}"
    print(f"compute-sanitizer: {detail}")
    return {"passed": found.returncode == 0, "detail": detail}


def check_memory(smoke: bool) -> Record:
    """Both memory checks, by name; a smoke run leaves out the tool's, which starts this command again."""
    guards = {"guard_zones": run_guards("cuda", parity_work(), torch.bfloat16)}
    return guards if smoke else guards | {"compute_sanitizer": run_sanitizer()}


def environment(device: torch.device) -> Record:
    """Versions and hardware, for the report."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name, "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1), "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip


def save(report: Record, folder: Path, arch: str) -> Path:
    """Write what is known so far; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels_{arch}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lut_kernels.bench", description="Parity, times and tuning on a GPU."
    )
    parser.add_argument(
        "--images", type=int, nargs="+", default=[64, 256, 512], help="images a step (default 64 256 512)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks"), help="folder of the report (default benchmarks)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="parity and the smallest batch only; leaves the table alone"
    )
    parser.add_argument("--parity-only", action="store_true", help="no times, nothing written")
    parser.add_argument("--no-tune", action="store_true", help="keep the tiles of the table")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("bench: needs a CUDA device, found none; nothing was measured", file=sys.stderr)
        return 2
    if INTERPRETED:
        print("bench: TRITON_INTERPRET is set, the kernels would run on the CPU; unset it", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    arch = architecture(device)
    parity = run_parity("cuda", (torch.bfloat16,) if options.smoke else (torch.bfloat16, torch.float16, torch.float32))
    failed = not all(record["passed"] for record in parity)
    if options.parity_only:
        return int(failed)
    memory = check_memory(options.smoke)
    failed = failed or any(check["passed"] is False for check in memory.values())
    top = ceiling("cuda")
    report: Record = {
        "command": " ".join(["python -m lut_kernels.bench", *(arguments if arguments is not None else sys.argv[1:])]),
        **environment(device), "copy_tb_s": top.copy_tb_s, "matmul_tflop_s": top.matmul_tflop_s,
        "parity": parity, "memory_check": memory,
    }  # fmt: skip
    save(report, options.out, arch)  # what follows takes long
    tuned = [] if options.smoke or options.no_tune or failed else tune("cuda", tuned_work(options.images[0]))
    tuned = without_spills(tuned, arch, json.loads(SPACE_PATH.read_text()))
    source = f"{report['device']}, torch {report['torch']}, {report['date']}"
    if tuned:  # the times below are taken with the tiles just found
        write(updated(table(), arch, [], tuned, source), TABLE_PATH)
        forget_table()
    images = tuple(sorted(options.images)[:1] if options.smoke else sorted(options.images))
    dtypes = (torch.bfloat16,) if options.smoke else (torch.bfloat16, torch.float16)
    report |= {"tuning": tuned, "times": run_times("cuda", images, dtypes, top)}
    if not options.smoke and not failed:
        write(updated(table(), arch, report["times"], tuned, source), TABLE_PATH)
        forget_table()
    path = save(report, options.out, arch)
    print_table(report["times"], device)
    print(f"{path}: written; table {'left alone' if options.smoke or failed else 'updated: ' + str(TABLE_PATH)}")
    if tuned:
        print("tiles changed: run python -m lut_kernels.resources --json, and commit both tables")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
