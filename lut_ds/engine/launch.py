"""Who am I among the ranks: nothing, torchrun, the deepspeed launcher and srun all end in one `Ranks`."""

import logging
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lut_kernels.dispatch import check_mode, current_mode

from lut_ds.errors import RunFault, UserError

# deepspeed.accelerator.real_accelerator's list; checked here because DeepSpeed's own error is a stack trace.
ACCELERATORS = ("cuda", "cpu", "xpu", "npu", "mps", "hpu", "mlu", "sdaa", "supa", "klxpu")
SUPPORTED_ACCELERATORS = ("cuda", "cpu")
# What gloo and NCCL say in a collective when another rank has ended.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@dataclass(frozen=True)
class Ranks:
    """Place of this process: global rank, ranks in all, rank on this node, the device it trains on, who started it."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    launcher: str

    @property
    def main(self) -> bool:
        """Rank 0 writes files and talks."""
        return self.rank == 0


def slurm_environment(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for a task that srun started; empty elsewhere.

    Only inside a step (SLURM_STEP_NUM_TASKS): a batch script has SLURM_PROCID too, but is not a rank.
    """
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        return {}
    found = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if _one_device_visible(env) else env.get("SLURM_LOCALID", "0"),
    }
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    found["MASTER_ADDR"] = env.get("MASTER_ADDR") or first_host(nodes)
    found["MASTER_PORT"] = env.get("MASTER_PORT") or str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)
    return found


def _one_device_visible(env: Mapping[str, str]) -> bool:
    """Whether Slurm shows this task its own GPU alone, which is then number 0 whatever the task's number."""
    bound = "SLURM_GPUS_PER_TASK" in env or env.get("SLURM_GPU_BIND", "").startswith(("single", "per_task"))
    return bound and len(env.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list such as `a`, `a,b`, `n[3-5,9]-ib`: `scontrol` where it is installed, else our reading."""
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True, timeout=30
        )
        return shown.stdout.split()[0]
    except (FileNotFoundError, subprocess.SubprocessError, IndexError):
        first = re.match(r"(?:[^\[\],]|\[\d[^\]]*\])+", nodelist)
        if first is None or nodelist.startswith("["):
            raise UserError(
                f"Slurm: expected a node list in SLURM_STEP_NODELIST, found {nodelist!r}; set MASTER_ADDR"
            ) from None
        return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def rank_cores() -> int:
    """CPU cores for this rank: what the process may use, over the ranks of its node that share it."""
    cores, env = len(os.sched_getaffinity(0)), os.environ
    if "LOCAL_WORLD_SIZE" not in env and "SLURM_CPUS_PER_TASK" in env:
        return max(1, min(cores, int(env["SLURM_CPUS_PER_TASK"])))
    return max(1, cores // int(env.get("LOCAL_WORLD_SIZE", env.get("SLURM_NTASKS_PER_NODE", "1"))))


def check_accelerator() -> str:
    """Name of the accelerator to train on, from DS_ACCELERATOR or what torch sees; sets the variable for DeepSpeed.

    Raises:
        UserError: DS_ACCELERATOR names nothing that exists, or something this machine lacks.
    """
    wanted = os.environ.get("DS_ACCELERATOR")
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    elif wanted not in ACCELERATORS:
        raise UserError(
            f"DS_ACCELERATOR: expected one of {', '.join(SUPPORTED_ACCELERATORS)}, found {wanted!r}; unset it or correct it"
        )
    elif wanted not in SUPPORTED_ACCELERATORS:
        raise UserError(f"DS_ACCELERATOR: {wanted!r} is not supported by lut_ds (cuda and cpu are); unset it")
    elif wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "DS_ACCELERATOR: 'cuda' asked for, but torch finds no CUDA device here; unset it to train on the CPU"
        )
    os.environ["DS_ACCELERATOR"] = wanted
    return wanted


def check_kernels(device: torch.device) -> None:
    """Refuse a value of LUT_KERNELS that names no mode, or one that cannot run on this device.

    Raises:
        UserError: what is accepted, and what was found.
    """
    try:
        check_mode(current_mode(), device)
    except ValueError as error:
        raise UserError(f"{error}; unset it or correct it") from None


def discover_ranks() -> Ranks:
    """Read the launcher's environment, complete it for Slurm or a lone process, and pick the device.

    Raises:
        UserError: bad accelerator or kernel mode, incomplete environment, more ranks on this node than devices.
    """
    accelerator = check_accelerator()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "environment"
    elif found := slurm_environment(os.environ):
        os.environ.update(found)
        launcher = "srun"
    elif alone := {"RANK", "WORLD_SIZE"} & set(os.environ):
        missing = ({"RANK", "WORLD_SIZE"} - alone).pop()
        raise UserError(
            f"launch: environment variable {missing}: expected beside {alone.pop()}, found none; start through torchrun, "
            "deepspeed or srun, or unset the other for a lone process"
        )
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        launcher = "none"
    rank, world_size = _integer("RANK"), _integer("WORLD_SIZE")
    if rank >= world_size:
        raise UserError(f"launch: RANK: expected less than WORLD_SIZE {world_size}, found {rank}; correct the launcher")
    if world_size > 1:
        _check_meeting_point()
    os.environ.setdefault("LOCAL_RANK", str(rank % max(torch.cuda.device_count(), 1)))
    local_rank = _integer("LOCAL_RANK")
    if accelerator == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"launch: local rank {local_rank} has no device: more ranks than the {torch.cuda.device_count()} CUDA device(s) of "
            f"{socket.gethostname()}; start fewer ranks a node, or set DS_ACCELERATOR=cpu",
            this_rank=True,
        )
    device = torch.device("cuda", local_rank) if accelerator == "cuda" else torch.device("cpu")
    check_kernels(device)
    return Ranks(rank, world_size, local_rank, device, launcher)


def _integer(name: str) -> int:
    value = os.environ.get(name, "")
    if not (value.isascii() and value.isdigit()):
        raise UserError(
            f"launch: environment variable {name}: expected a number, found {value!r}; start through torchrun, deepspeed or srun"
        )
    return int(value)


def _check_meeting_point() -> None:
    """Refuse what torch would wait for, half an hour, or end on in a stack trace."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(
            f"launch: MASTER_PORT: expected a port number, found {port!r}; set it to a free port of rank 0's node"
        )
    try:
        found = bool(address) and bool(socket.getaddrinfo(address, int(port)))
    except (OSError, UnicodeError):
        found = False
    if not found:
        raise UserError(
            f"launch: MASTER_ADDR: expected a host that resolves on {socket.gethostname()}, found {address!r}; set it to "
            "rank 0's node",
            this_rank=True,
        )


@contextmanager
def process_group(ranks: Ranks, timeout_minutes: float = 30.0) -> Iterator[None]:
    """Join the ranks through DeepSpeed (NCCL on GPUs, gloo on CPUs) and leave in good order.

    The closing barrier matters: without it gloo aborts at exit in up to a third of runs.

    Raises:
        UserError: the rendezvous port is taken.
        RunFault: the ranks did not meet in time.
    """
    import deepspeed

    _quieten(deepspeed)
    # Its first use would compile a C++ extension for half a minute, and a killed build hangs later runs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_PORT", "0")  # any: nobody else has to know it
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(backend, timeout=timedelta(minutes=timeout_minutes), verbose=False)
    except (RuntimeError, dist.DistNetworkError) as error:
        if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"launch: port in use: {where}; another run listens there, set MASTER_PORT to a free port"
            ) from error
        if isinstance(error, dist.DistError):
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RunFault(
                f"launch: the {ranks.world_size} ranks did not meet at {where} within {timeout_minutes:g} minutes: "
                f"{str(error).splitlines()[0]} See that all ranks were started and can reach that address"
            ) from error
        raise
    try:
        yield
        dist.barrier()
    except UserError:
        raise  # the same on every rank: all leave together
    except BaseException as error:
        if ranks.device.type == "cuda" and ranks.world_size > 1:
            # The other ranks may be inside a collective, for which NCCL's orderly shutdown would wait.
            dist.distributed_c10d._abort_process_group()
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER):
            raise RunFault(
                f"launch: rank {ranks.rank} lost another rank, whose own message says why; the last good checkpoint is intact"
            ) from error
        raise
    finally:
        if dist.is_initialized():
            deepspeed.comm.destroy_process_group()  # its own, which also forgets the groups that it made


def _quieten(deepspeed: Any) -> None:
    """DeepSpeed's own log: warnings only, and not the one about our optimizer, which is torch's AdamW with a flag."""
    log = deepspeed.utils.logger
    log.setLevel(logging.WARNING)
    log.addFilter(lambda entry: "untested optimizer" not in entry.getMessage())
