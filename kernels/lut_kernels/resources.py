"""Registers, shared memory, spills and vector widths of every kernel the table can choose, compiled without a GPU.

python -m lut_kernels.resources --json            write the committed table
python -m lut_kernels.resources --check           compile again, exit 1 where something got worse
python -m lut_kernels.resources --space           compile the whole tuning space, print what does not fit
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lut_kernels.dispatch import forced_tiles
from lut_kernels.runtime import INTERPRETED, Launch, record_launches
from lut_kernels.tuning import SPACE, Case, cases

PATH = Path(__file__).with_name("resources.json")
SPACE_PATH = Path(__file__).with_name("resources_space.json")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.uint8: "u8",
    torch.int64: "i64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
OPTIONS = ("num_warps", "num_stages")
Report = dict[str, Any]


@dataclass(frozen=True)
class Build:
    """What the JIT would compile for a launch: every parameter's type, the constants, what is known to be aligned."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    options: dict[str, int]

    def key(self) -> str:
        """Equal for launches that share a binary."""
        return repr((self.kernel.__name__, self.signature, self.constants, self.aligned, self.options))

    def compile(self, arch: int) -> Report:
        """Resources of the binary on one architecture."""
        place = {name: (index,) for index, name in enumerate(self.kernel.arg_names)}
        source = ASTSource(
            fn=self.kernel,
            signature=self.signature,
            constexprs={place[name]: value for name, value in self.constants.items()},
            attrs={place[name]: [["tt.divisibility", 16]] for name in self.aligned},
        )
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(self.options))
        resources = {"kernel": self.kernel.__name__, "shared": binary.metadata.shared}
        return resources | _assembled(binary.asm["ptx"], arch)


def build_of(launch: Launch) -> Build:
    """Specialise a recorded launch as the JIT does: pointers taken as 16-byte aligned, integers as they are."""
    kernel = launch.kernel
    given = dict(zip(kernel.arg_names, launch.args)) | launch.constants
    build = Build(kernel, {}, {}, [], {name: given.pop(name) for name in OPTIONS if name in given})
    for name in kernel.arg_names:
        value = given[name]
        if isinstance(value, torch.Tensor):
            build.signature[name] = "*" + TYPES[value.dtype]
            build.aligned.append(name)
        elif name in launch.constants or (isinstance(value, int) and value == 1):
            build.signature[name] = "constexpr"
            build.constants[name] = value
        elif isinstance(value, int):
            build.signature[name] = "i32"
            if value % 16 == 0:
                build.aligned.append(name)
        else:
            build.signature[name] = "fp32"
    return build


def _assembled(ptx: str, arch: int) -> Report:
    """Registers and spilled bytes from ptxas, the widest global accesses from the PTX."""
    tool = triton.knobs.nvidia.ptxas_blackwell if arch >= 100 else triton.knobs.nvidia.ptxas
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if target is None:
        raise RuntimeError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={target[1]}", str(path), "-o", os.devnull]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", log))
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", log))
    return {
        "registers": registers,
        "spilled": spills,
        "load16": _vectorised(ptx, "ld"),
        "store16": _vectorised(ptx, "st"),
    }


def _vectorised(ptx: str, access: str) -> float:
    """Share of the bytes of global loads or stores that move 16 at a time, over the instructions in the PTX."""
    sizes = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(rf"\b{access}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    ]
    if access == "ld":
        copies = re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?, (0x[0-9a-f]+)", ptx)
        sizes += [int(size, 16) for size in copies]
    return round(sum(size for size in sizes if size == 16) / max(sum(sizes), 1), 2)


def build_case(arch: int, case: Case, tile: dict[str, int] | None) -> Build | None:
    """The build of a case with the table's tile, or the one given; None where its launcher takes another kernel."""
    with record_launches(f"sm_{arch}") as noted, forced_tiles({case.tile: tile} if tile else {}):
        case.run("meta")
    return next((build_of(one) for one in noted.launches if one.kernel.__name__ == case.kernel), None)


def compile_case(job: tuple[int, int, dict[str, int] | None]) -> tuple[str, Report]:
    """(name, report) of one case on one architecture."""
    arch, index, tile = job
    case = cases()[index]
    build = build_case(arch, case, tile)
    if build is None:
        raise ValueError(f"{case.name}: expected a launch of {case.kernel}, found none")
    return f"sm_{arch} {case.name}" + (f" {json.dumps(tile)}" if tile else ""), build.compile(arch)


def distinct(archs: Iterable[int], space: bool) -> list[tuple[int, int, dict[str, int] | None]]:
    """Cases to compile, each binary once: with the table's tiles, or with every tile of the tuning space."""
    work: list[tuple[int, int, dict[str, int] | None]] = []
    for arch in archs:
        seen: set[str] = set()
        for index, case in enumerate(cases()):
            for tile in SPACE.get(case.tile, []) if space else [None]:
                build = build_case(arch, case, tile)
                if build is not None and build.key() not in seen:
                    seen.add(build.key())
                    work.append((arch, index, tile))
    return work


def measure(archs: Iterable[int], space: bool, jobs: int) -> dict[str, Report]:
    """Compile the chosen tiles, or the whole tuning space, for these architectures."""
    with ProcessPoolExecutor(jobs) as pool:
        return dict(sorted(pool.map(compile_case, distinct(archs, space)), key=lambda pair: pair[0]))


def faults(name: str, report: Report) -> list[str]:
    """What rules a kernel out on its own: spills, or more shared memory than the device has."""
    arch = int(name.split()[0].removeprefix("sm_"))
    found = []
    if report["spilled"]:
        found.append(f"{name}: spills {report['spilled']} bytes")
    if report["shared"] > SHARED_LIMIT[arch]:
        found.append(f"{name}: {report['shared']} bytes of shared memory, the device has {SHARED_LIMIT[arch]}")
    return found


def worse(now: dict[str, Report], before: dict[str, Report]) -> list[str]:
    """Kernels missing from the committed table, and every number that got worse."""
    found = []
    for name, report in now.items():
        old = before.get(name)
        if old is None:
            found.append(f"{name}: not in the committed table; run python -m lut_kernels.resources --json")
            continue
        for key, sign in (("registers", 1), ("shared", 1), ("spilled", 1), ("load16", -1), ("store16", -1)):
            if sign * report[key] > sign * old[key]:
                found.append(f"{name}: {key} was {old[key]}, is {report[key]}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lut_kernels.resources", description="Compile every kernel ahead of time and keep its resources."
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--json", action="store_true", help="write the committed table")
    action.add_argument("--check", action="store_true", help="compare with it; exit 1 where something got worse")
    parser.add_argument("--space", action="store_true", help="the whole tuning space instead of the chosen tiles")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT), help="default: all")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if INTERPRETED:
        print("resources: TRITON_INTERPRET is set, nothing would be compiled; unset it", file=sys.stderr)
        return 2
    if options.json and options.arch:
        parser.error("--json writes every architecture: leave out --arch")
    path = SPACE_PATH if options.space else PATH
    now = measure(options.arch or sorted(SHARED_LIMIT), options.space, options.jobs)
    if options.json:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(report)}" for name, report in now.items())
        path.write_text("{\n" + lines + "\n}\n")
    before = json.loads(path.read_text())
    # A tile that spills may be tried, and never be chosen.
    found = worse(now, before) + ([] if options.space else [fault for pair in now.items() for fault in faults(*pair)])
    print("\n".join([*found, f"{len(now)} kernels compiled, {len(found)} faults"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
