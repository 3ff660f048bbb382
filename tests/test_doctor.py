"""The doctor tries things for real, says what to do, and survives what is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lut_ds import doctor as module
from lut_ds.doctor import describe_report, examine
from tests.engine.launching import PATIENCE

EXPECTED = {
    "python", "torch", "CUDA", "DS_ACCELERATOR", "NCCL", "gloo", "DALI", "DALI on GPU", "DeepSpeed", "Triton", "kernels",
    "compiler", "Slurm", "wandb", "CPU cores", "memory", "/dev/shm", "disk", "open files",
}  # fmt: skip


def doctor(*arguments: str, **env: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "lut_ds", "doctor", "--json", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def by_name(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in report["checks"]}


def test_the_report_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, as one report takes seconds."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(module, "PART_SECONDS", PATIENCE)
    report = examine()
    found = by_name(report)
    assert sorted(check["name"] for check in report["checks"]) == sorted(EXPECTED)
    for check in report["checks"]:
        assert set(check) == {"name", "status", "found", "advice"}
        assert check["status"] in ("ok", "missing", "problem")
        assert check["found"]
        assert bool(check["advice"]) == (check["status"] != "ok"), check
    for name in ("python", "torch", "gloo", "DALI", "DeepSpeed", "Triton", "kernels", "DS_ACCELERATOR"):
        assert found[name]["status"] == "ok", found[name]
    assert torch.__version__ in found["torch"]["found"]
    assert report["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert report["problems"] == [name for name in found if found[name]["status"] == "problem"]
    for name in ("CUDA", "NCCL", "DALI on GPU"):
        assert found[name]["status"] == ("ok" if torch.cuda.is_available() else "missing"), found[name]
    expect_text(report)


def expect_text(report: dict[str, Any]) -> None:
    """Every check on a line of its own, aligned, with its advice after it."""
    lines = describe_report(report).splitlines()
    assert max(map(len, lines)) <= 120
    width = max(map(len, EXPECTED))
    for check in report["checks"]:
        (line,) = [line for line in lines if line[:width].rstrip() == check["name"]]
        assert line[width:].split()[0] == check["status"]
        if check["advice"]:
            advice = next(line for line in lines[lines.index(line) + 1 :] if "-> " in line)
            assert advice.split("-> ")[1].split()[0] == check["advice"].split()[0]
    assert "Training runs here" in lines[-1]


@pytest.mark.parametrize(
    "value, accepted", [("typo", "one of auto, torch, triton, found 'typo'"), ("triton", "auto or torch, Triton needs")]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="LUT_KERNELS=triton is fine on a GPU")
def test_a_wrong_kernel_mode_is_named(value: str, accepted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUT_KERNELS", value)
    found = {finding.name: finding for finding in module._try_part("kernels")}
    assert (found["Triton"].status, found["kernels"].status) == ("ok", "problem")
    assert found["kernels"].found.startswith(f"LUT_KERNELS: expected {accepted}")
    assert found["kernels"].advice == "unset LUT_KERNELS, or correct it"


@pytest.mark.slow
def test_a_broken_library_is_a_finding_with_its_error(tmp_path: Path) -> None:
    """DALI that does not import, DeepSpeed that kills its process, an accelerator that is none: one report all the same."""
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").write_text("raise ImportError('libnvidia.so: wrong version')\n")
    (tmp_path / "deepspeed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    report = doctor(PYTHONPATH=str(tmp_path), DS_ACCELERATOR="banana")
    found = by_name(report)
    assert found["DALI"]["status"] == "problem"
    assert found["DALI"]["found"] == "ImportError: libnvidia.so: wrong version"
    assert found["DeepSpeed"]["status"] == "problem"
    assert "signal 11" in found["DeepSpeed"]["found"]
    assert found["DS_ACCELERATOR"]["status"] == "problem"
    assert "banana" in found["DS_ACCELERATOR"]["found"]
    assert found["torch"]["status"] == "ok"
    assert report["device"] is None
    assert {"DALI", "DeepSpeed", "DS_ACCELERATOR"} <= set(report["problems"])
    assert "Training does not run here yet" in describe_report(report)


def test_slurm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of those names on PATH: whole and answering, without an answer, and only some of them."""

    def install(*names: str, ping: int) -> Path:
        folder = tmp_path / f"{len(names)}{ping}"
        folder.mkdir()
        for name in names:
            script = f'#!/bin/sh\ncase "$1" in --version) echo "slurm 22.05.8";; ping) exit {ping};; esac\n'
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    names = ("sbatch", "srun", "squeue", "scontrol")
    statuses = []
    for commands, ping in ((names, 0), (names, 1), (names[:2], 0), ((), 0)):
        install(*commands, ping=ping)
        finding = module._slurm()
        statuses.append(finding.status)
        assert bool(finding.advice) == (finding.status != "ok")
    assert statuses == ["ok", "problem", "problem", "missing"]
