"""Finding out which rank this is, under every launcher, and what is refused before ranks wait for each other."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lut_kernels import dispatch

from lut_ds.engine.launch import discover_ranks, first_host, process_group, slurm_environment
from lut_ds.errors import UserError
from tests.engine.launching import PATIENCE, ROOT, free_port

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "TORCHELASTIC_", "DS_ACCELERATOR")
STEP = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "123456",
}
PAIR = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


@pytest.fixture(autouse=True)
def _no_launcher() -> Iterator[None]:
    """Each test starts in an environment without a launcher; `discover_ranks` writes into it."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(LAUNCHER_VARIABLES):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def no_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a compute node's container: Slurm's variables without its commands."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("no_scontrol")
def test_a_step_of_srun_becomes_a_rank() -> None:
    assert slurm_environment(STEP) == {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": str(20000 + 123456 % 20000),
    }


def test_what_the_script_exported_is_kept() -> None:
    found = slurm_environment({**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("head", "1234")


def test_a_batch_script_is_no_rank() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "8"}
    assert slurm_environment(batch) == {}
    os.environ.update(batch)
    ranks = discover_ranks()
    assert (ranks.world_size, ranks.launcher) == (1, "none")


@pytest.mark.usefixtures("no_scontrol")
@pytest.mark.parametrize(
    "nodes, first",
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[3-5,9]", "n3"),
        ("n[9,3-5]", "n9"),
        ("node[008,010-012]", "node008"),
        ("n1,n[2-3]", "n1"),
        ("a[1-2],b", "a1"),
        ("rack1-node[1-2]", "rack1-node1"),
        ("n[3-5]-ib", "n3-ib"),
        ("gpu-a100-[001-004].cluster.local", "gpu-a100-001.cluster.local"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("10.0.0.[5-6]", "10.0.0.5"),
    ],
)
def test_first_host_without_slurms_commands(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.usefixtures("no_scontrol")
@pytest.mark.parametrize("nodes", ["", ",", "[1-2]"])
def test_a_node_list_that_is_none(nodes: str) -> None:
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST.*set MASTER_ADDR"):
        first_host(nodes)


def test_first_host_asks_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A command of that name on PATH: what it prints wins over our own reading."""
    command = tmp_path / "scontrol"
    command.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "alpha\\nbeta\\n"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert first_host("n[1-2]") == "alpha"
    assert first_host("m[4-5]") == "m4"  # it fails for that list


def test_a_lone_process() -> None:
    ranks = discover_ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.main, ranks.launcher) == (0, 1, 0, True, "none")
    assert ranks.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert os.environ["DS_ACCELERATOR"] == ranks.device.type


def test_the_environment_of_torchrun_wins_over_slurm() -> None:
    os.environ.update({**STEP, **PAIR, "RANK": "1", "DS_ACCELERATOR": "cpu", "TORCHELASTIC_RUN_ID": "x"})
    ranks = discover_ranks()
    assert (ranks.rank, ranks.world_size, ranks.main, ranks.launcher) == (1, 2, False, "torchrun")


def test_srun() -> None:
    os.environ.update({**STEP, "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"})
    ranks = discover_ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.launcher) == (3, 8, 1, "srun")
    assert os.environ["RANK"] == "3"


@pytest.mark.parametrize("value", ["banana", "", "CPU", "cuda:0"])
def test_an_accelerator_that_does_not_exist(value: str) -> None:
    os.environ["DS_ACCELERATOR"] = value
    with pytest.raises(UserError, match=f"DS_ACCELERATOR: expected one of cuda, cpu, found '{value}'"):
        discover_ranks()


@pytest.mark.parametrize("value, accepted", [("typo", "one of auto, torch, triton"), ("triton", "auto or torch")])
def test_a_kernel_mode_that_cannot_run(value: str, accepted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    monkeypatch.setattr(dispatch, "_environment", value)
    with pytest.raises(
        UserError, match=f"LUT_KERNELS: expected {accepted}.* found .?{value}.?; unset it or correct it"
    ):
        discover_ranks()


def test_an_accelerator_that_we_do_not_support() -> None:
    os.environ["DS_ACCELERATOR"] = "xpu"
    with pytest.raises(UserError, match="'xpu' is not supported"):
        discover_ranks()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_accelerator_that_is_not_here() -> None:
    os.environ["DS_ACCELERATOR"] = "cuda"
    with pytest.raises(UserError, match="no CUDA device here; unset it"):
        discover_ranks()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_ranks_than_devices() -> None:
    count = torch.cuda.device_count()
    os.environ.update({**PAIR, "WORLD_SIZE": str(count + 1), "RANK": str(count), "LOCAL_RANK": str(count)})
    with pytest.raises(UserError, match="more ranks than") as caught:
        discover_ranks()
    assert caught.value.this_rank


@pytest.mark.parametrize(
    "change, named",
    [
        ({"RANK": "x"}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"RANK": "\u00b2"}, "RANK"),
        ({"RANK": ""}, "RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"RANK": "2"}, "RANK"),
        ({"LOCAL_RANK": "z"}, "LOCAL_RANK"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR"),
    ],
)
def test_an_environment_that_cannot_be_is_refused_at_once(change: dict[str, str], named: str) -> None:
    """Otherwise the ranks wait half an hour for each other, or end in a stack trace of another package."""
    os.environ.update({**PAIR, "DS_ACCELERATOR": "cpu", **change})
    started = time.monotonic()
    with pytest.raises(UserError, match=f"launch: .*{named}"):
        discover_ranks()
    assert time.monotonic() - started < 300  # a name may be looked up with several servers that do not answer


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_refused(missing: str) -> None:
    """With WORLD_SIZE but no RANK, two lone processes would write one run folder."""
    os.environ.update({**PAIR, "DS_ACCELERATOR": "cpu"})
    del os.environ[missing]
    with pytest.raises(UserError, match=f"launch: .*{missing}"):
        discover_ranks()


def test_a_process_may_join_again() -> None:
    """DeepSpeed keeps the groups that it makes; those of a group that was left would be asked in the next one."""
    import deepspeed
    from deepspeed.utils import groups

    for _ in range(2):
        with process_group(discover_ranks()):
            assert deepspeed.comm.get_global_rank(groups._clone_world_group(), 0) == 0


JOIN = """
import sys
import torch.distributed as dist
from lut_ds.engine.launch import discover_ranks, process_group
from lut_ds.errors import UserError
try:
    with process_group(discover_ranks()):
        print("joined", dist.get_world_size(), dist.get_backend())
except UserError as error:
    sys.exit(f"refused: {error}")
"""


def join(**env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", JOIN],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_lone_process_joins_itself() -> None:
    done = join()
    assert done.stdout == "joined 1 gloo\n"
    assert done.returncode == 0


def test_a_port_in_use_is_one_line_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = join(**{**PAIR, "MASTER_PORT": str(port)})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"refused: launch: port in use: 127.0.0.1:{port}; ")


def test_ranks_that_never_come_are_a_fault_in_one_line() -> None:
    code = JOIN.replace("UserError", "RunFault").replace("discover_ranks())", "discover_ranks(), timeout_minutes=0.05)")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **PAIR, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stderr.splitlines()[-1].startswith("refused: launch: "), done.stderr[-2000:]
