"""What works on this machine, found by trying it, and what to do about what does not.

Libraries that can crash, hang or print while they load are tried in processes of their own (`python -m lut_ds.doctor
PART`), at the same time and with a time limit; the rest is read from the machine. Nothing is downloaded.
"""

import importlib
import io
import json
import netrc
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from lut_ds.errors import UserError
from lut_ds.machine import memory_limit

PART_SECONDS = 120
COMMAND_SECONDS = 15
GIB = 2**30
MIN_DISK, MIN_MEMORY, MIN_SHARED_MEMORY, MIN_OPEN_FILES = 50 * GIB, 8 * GIB, GIB // 2, 4096


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        name: of the thing.
        status: `ok`; `missing`: not here, and nothing is wrong as long as it is not wanted; `problem`: here and broken.
        found: what was seen.
        advice: what to do, empty if ok.
    """

    name: str
    status: Literal["ok", "missing", "problem"]
    found: str
    advice: str = ""


def examine() -> dict[str, Any]:
    """Try everything.

    Returns:
        `checks`: a list of `Finding`s as dicts; `device`: `cuda` or `cpu`, what training would use, None if neither
        works; `problems`: names of the checks with that status.
    """
    with ThreadPoolExecutor(len(PARTS)) as pool:
        parts = list(pool.map(_try_part, PARTS))
    found = [_python(), *(finding for part in parts for finding in part)]
    found += [_compiler(), _slurm(), _wandb(), _cores(), _memory(), _shared_memory(), _disk(), _open_files()]
    status = {finding.name: finding.status for finding in found}
    asked = next((finding.found.split()[0] for finding in found if finding.name == "DS_ACCELERATOR"), "")
    needed = ["torch", "DS_ACCELERATOR", "DALI", "DeepSpeed", *(["CUDA"] if asked == "cuda" else [])]
    usable = all(status.get(name) == "ok" for name in needed)
    return {
        "checks": [asdict(finding) for finding in found],
        "device": asked if usable else None,
        "problems": [finding.name for finding in found if finding.status == "problem"],
    }


def describe_report(report: dict[str, Any]) -> str:
    """The report as aligned lines for a person."""
    names = max(len(check["name"]) for check in report["checks"])
    lines = []
    for check in report["checks"]:
        head = f"{check['name']:{names}}  {check['status']:7}  "
        rest = " " * len(head)
        lines += textwrap.wrap(check["found"], 120, initial_indent=head, subsequent_indent=rest)
        lines += textwrap.wrap(check["advice"], 120, initial_indent=rest + "-> ", subsequent_indent=rest + "   ")
    device = {"cuda": "Training runs here, on the GPU.", "cpu": "Training runs here, on the CPU."}
    problems = f" Problems: {', '.join(report['problems'])}." if report["problems"] else ""
    return "\n".join([*lines, "", device.get(report["device"], "Training does not run here yet.") + problems])


def _try_part(part: str) -> list[Finding]:
    """The findings of a part, or one that says how its process ended."""
    # The same import path as here, without the current folder unless it is on ours.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "lut_ds.doctor", part],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=PART_SECONDS,
            env=env,
            check=False,
        )
    except subprocess.TimeoutExpired:
        advice = f"`{Path(sys.executable).name} -X faulthandler -m lut_ds.doctor {part}` shows where it waits"
        return [Finding(part, "problem", f"no answer within {PART_SECONDS} s", advice)]
    if done.returncode == 0:
        return [Finding(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]
    said = [line for line in done.stderr.splitlines() if line.strip()]
    ended = said[-1] if said else f"exit code {done.returncode}"
    if done.returncode < 0:
        ended = f"killed by signal {-done.returncode} ({signal.strsignal(-done.returncode)})"
    advice = "install the versions of requirements.lock in a fresh environment (`make demo` does)"
    return [Finding(part, "problem", ended.strip(), advice)]


def _command(*words: str) -> str | None:
    """Standard output of a command, or None if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _try_torch() -> list[Finding]:
    """torch, its devices, the accelerator DeepSpeed will be told, and what the ranks talk through."""
    import torch

    from lut_ds.engine.launch import check_accelerator

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    found = [Finding("torch", "ok", f"{torch.__version__}, built {build}"), _cuda_devices()]
    try:
        how = "asked for" if "DS_ACCELERATOR" in os.environ else "chosen, as it is not set"
        found.append(Finding("DS_ACCELERATOR", "ok", f"{check_accelerator()} ({how})"))
    except UserError as error:
        found.append(Finding("DS_ACCELERATOR", "problem", str(error).rsplit("; ", 1)[0], str(error).rsplit("; ", 1)[1]))
    return [*found, _nccl(), _all_reduce("gloo")]


def _cuda_devices() -> Finding:
    import torch

    smi = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = f"driver {smi.splitlines()[0]}" if smi else "no driver (nvidia-smi finds none)"
    if not torch.cuda.is_available():
        if smi:
            advice = (
                f"the driver must support CUDA {torch.version.cuda}: update it, or install the build of torch for an "
                "older CUDA (extra cuda12); check CUDA_VISIBLE_DEVICES"
            )
            return Finding("CUDA", "problem", f"{driver}, but torch finds no device", advice)
        return Finding("CUDA", "missing", driver, "nothing, to train on the CPU; for a GPU install NVIDIA's driver")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = [f"{d.name}, {d.total_memory / GIB:.0f} GiB, sm_{d.major}{d.minor}" for d in devices]
    text = "; ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    try:
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        advice = "look for another process on the device with nvidia-smi; reset or leave out a device that is broken"
        return Finding("CUDA", "problem", f"{text}; {driver}; a sum fails: {_first_line(error)}", advice)
    return Finding("CUDA", "ok", f"{text}; {driver}")


def _nccl() -> Finding:
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        return Finding("NCCL", "missing", "this torch has none", "nothing, on CPUs; for GPUs install torch with CUDA")
    if not torch.cuda.is_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))
        return Finding("NCCL", "missing", f"{version}, without a device", "nothing: ranks on CPUs talk through gloo")
    return _all_reduce("nccl")


def _all_reduce(backend: str) -> Finding:
    """A real all-reduce of one rank."""
    import torch
    import torch.distributed as dist

    name = {"nccl": "NCCL"}.get(backend, backend)
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        value = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(value)
        dist.destroy_process_group()
    except RuntimeError as error:
        advice = "`hostname` must resolve to an address of this machine; or name an interface in "
        variable = {"nccl": "NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO tells more)"}.get(backend, "GLOO_SOCKET_IFNAME")
        return Finding(name, "problem", f"an all-reduce fails: {_first_line(error)}", advice + variable)
    version = ".".join(map(str, torch.cuda.nccl.version())) + ", " if backend == "nccl" else ""
    return Finding(name, "ok", f"{version}all-reduce of one rank done")


def _try_dali() -> list[Finding]:
    """Import DALI, decode a JPEG on the CPU, and on the GPU where there is one."""
    import numpy as np
    import torch
    from nvidia import dali
    from PIL import Image

    image = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 40, 40)).save(image, "JPEG")
    encoded = np.frombuffer(image.getvalue(), np.uint8)

    def decode(device: str) -> str | None:
        """What goes wrong, or None."""
        try:
            pipeline = dali.Pipeline(1, 1, None if device == "cpu" else 0)
            with pipeline:
                jpeg = dali.fn.external_source(lambda: [encoded])
                pipeline.set_outputs(dali.fn.decoders.image(jpeg, device=device))
            (batch,) = pipeline.run()
        except RuntimeError as error:
            return _first_line(error)
        pixel = np.asarray(batch.as_cpu()[0])[0, 0].tolist()
        return None if max(abs(a - b) for a, b in zip(pixel, (200, 40, 40))) < 8 else f"a red image came out as {pixel}"

    failed = decode("cpu")
    if failed:
        advice = "install the DALI build for torch's CUDA version: extra cuda13 or cuda12 of this package"
        found = [Finding("DALI", "problem", f"{dali.__version__}; decoding on the CPU fails: {failed}", advice)]
    else:
        found = [Finding("DALI", "ok", f"{dali.__version__}; a JPEG was decoded on the CPU")]
    if not torch.cuda.is_available():
        return [*found, Finding("DALI on GPU", "missing", "no CUDA device", "nothing: JPEGs are decoded on the CPU")]
    failed = decode("mixed")
    if failed:
        advice = "the driver must support DALI's CUDA version: update it, or install the extra for the older CUDA"
        return [*found, Finding("DALI on GPU", "problem", f"decoding on the GPU fails: {failed}", advice)]
    return [*found, Finding("DALI on GPU", "ok", "a JPEG was decoded on the GPU")]


def _try_deepspeed() -> list[Finding]:
    """Import DeepSpeed; an accelerator that cannot be has its own finding."""
    import torch

    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    deepspeed = importlib.import_module("deepspeed")
    return [Finding("DeepSpeed", "ok", f"{deepspeed.__version__}; imported")]


def _try_kernels() -> list[Finding]:
    """Triton, and the side of every operator that training would run, after running one of them."""
    import torch
    import triton
    from lut_kernels import OPS, choice, gather_patches, kernels_mode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"attention": (197, 64)}  # ViT-B's teacher
    try:
        sides = [f"{op} {choice(op, device, torch.bfloat16, *shapes.get(op, ()))}" for op in OPS]
    except ValueError as error:
        triton_found = Finding("Triton", "ok", f"{triton.__version__}; imported, not tried")
        return [triton_found, Finding("kernels", "problem", str(error), "unset LUT_KERNELS, or correct it")]
    found = [Finding("kernels", "ok", f"in bf16 on {device}: {', '.join(sides)}")]
    if device == "cpu":
        return [Finding("Triton", "ok", f"{triton.__version__}; imported, compiles for GPUs only"), *found]
    pixels = torch.arange(2 * 32 * 32 * 3, device=device).to(torch.uint8).view(2, 32, 32, 3)
    advice = "set LUT_KERNELS=torch to train without them, and report this"
    try:
        with kernels_mode("triton"):
            ours = gather_patches(pixels, None, 16)
        with kernels_mode("torch"):
            wanted = gather_patches(pixels, None, 16)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return [Finding("Triton", "problem", f"{triton.__version__}; compiling fails: {_first_line(error)}", advice)]
    if not torch.allclose(ours, wanted, atol=1e-5):
        return [Finding("Triton", "problem", f"{triton.__version__}; a kernel gives wrong values", advice), *found]
    return [Finding("Triton", "ok", f"{triton.__version__}; a kernel was compiled and gives torch's values"), *found]


PARTS: dict[str, Callable[[], list[Finding]]] = {
    "torch": _try_torch,
    "DALI": _try_dali,
    "DeepSpeed": _try_deepspeed,
    "kernels": _try_kernels,
}


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return Finding("python", "ok", text)
    return Finding("python", "problem", text, "use Python 3.11 or 3.12, the ones this is tested with")


def _compiler() -> Finding:
    compilers = {name: shutil.which(name) for name in ("gcc", "g++")}
    if all(compilers.values()):
        return Finding("compiler", "ok", ", ".join(str(path) for path in compilers.values()))
    missing = " and ".join(name for name, path in compilers.items() if path is None)
    return Finding("compiler", "missing", f"no {missing}", "install gcc and g++: Triton and torch.compile need them")


def _slurm() -> Finding:
    wanted = ("sbatch", "srun", "squeue", "scontrol")
    missing = [name for name in wanted if shutil.which(name) is None]
    if len(missing) == len(wanted):
        return Finding("Slurm", "missing", "no command of it", "nothing, off a cluster: use torchrun or deepspeed")
    if missing:
        return Finding("Slurm", "problem", f"no {', '.join(missing)}", "install Slurm's client commands whole")
    version = _command("scontrol", "--version") or "version unknown"
    if _command("scontrol", "ping") is None:
        advice = "check slurm.conf (SLURM_CONF), the munge service, and that the controller is up"
        return Finding("Slurm", "problem", f"{version}; the controller does not answer", advice)
    return Finding("Slurm", "ok", f"{version}; the controller answers")


def _wandb() -> Finding:
    try:
        version = metadata.version("wandb")
    except metadata.PackageNotFoundError:
        return Finding("wandb", "missing", "not installed", "nothing, with run.wandb=off; else install wandb")
    try:
        known = any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        known = False
    if known or os.environ.get("WANDB_API_KEY"):
        return Finding("wandb", "ok", f"{version}, with a key")
    advice = "nothing, with run.wandb=off or offline; for online run `wandb login` or set WANDB_API_KEY"
    return Finding("wandb", "missing", f"{version}, without a key", advice)


def _cores() -> Finding:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if usable >= 2:
        return Finding("CPU cores", "ok", f"{usable} usable of {there}")
    advice = "loading images and training share it: ask for more (srun --cpus-per-task, docker --cpus)"
    return Finding("CPU cores", "problem", f"{usable} usable of {there}", advice)


def _memory() -> Finding:
    import psutil

    limit = memory_limit()
    text = f"{limit / GIB:.0f} GiB, {psutil.virtual_memory().available / GIB:.0f} GiB free"
    if limit >= MIN_MEMORY:
        return Finding("memory", "ok", text)
    return Finding(
        "memory", "problem", text, "lower train.micro_batch, data.prefetch and data.threads, or ask for more"
    )


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        return Finding("/dev/shm", "problem", str(error), "mount a tmpfs there: NCCL's ranks of one node share it")
    if size >= MIN_SHARED_MEMORY:
        return Finding("/dev/shm", "ok", f"{size / GIB:.1f} GiB")
    advice = "NCCL's ranks of one node share it: start the container with --shm-size=8g or --ipc=host"
    return Finding("/dev/shm", "problem", f"{size / GIB:.2f} GiB", advice)


def _disk() -> Finding:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.0f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", "problem", f"{folder} cannot be written", "set run.dir to a folder that can")
    if free >= MIN_DISK:
        return Finding("disk", "ok", text)
    advice = "a checkpoint of ViT-L takes 5 GiB and run.keep_last + 1 are there at a time: set run.dir to a larger disk"
    return Finding("disk", "problem", text, advice)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    text = f"{'unlimited' if soft == unlimited else soft} (at most {'unlimited' if hard == unlimited else hard})"
    if soft == unlimited or soft >= MIN_OPEN_FILES:
        return Finding("open files", "ok", text)
    return Finding("open files", "problem", text, f"run `ulimit -n {MIN_OPEN_FILES}` first, or raise the hard limit")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    print(json.dumps([asdict(finding) for finding in PARTS[sys.argv[1]]()]))
