"""Tiny real runs, made once by the real command and shared by all tests (and by xdist's workers)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.engine.launching import PATIENCE

TINY = (
    "model.image_size=32",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.decoder_width=16",
    "model.decoder_heads=2",
    "model.patch_size=8",
    "method.head_hidden=32",
    "train.epochs=3",
    "train.global_batch=144",
    "optim.warmup_epochs=1",
    "run.keep_every_epochs=1",
    "run.log_every=2",
)


def lut_ds(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in `cwd`."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "lut_ds", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)


def shared(factory: pytest.TempPathFactory, name: str, *arguments: str) -> Path:
    """A folder in which `lut-ds ARGUMENTS --json` ran once; its result is in result.json there."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "result.json").is_file():
            folder.mkdir()
            done = lut_ds(*arguments, "--json", cwd=folder)
            assert done.returncode == 0, done.stderr
            assert isinstance(json.loads(done.stdout), dict)
            (folder / "stderr.txt").write_text(done.stderr)
            (folder / "result.json").write_text(done.stdout)
    return folder


def demo_folder(factory: pytest.TempPathFactory) -> Path:
    """Where a tiny `lut-ds demo` ran: its run is runs/demo."""
    return shared(factory, "tiny-demo", "demo", *TINY)


def mae_folder(factory: pytest.TempPathFactory) -> Path:
    """Where two steps of a tiny MAE were trained on the demo's digits: its run is run/."""
    data = demo_folder(factory) / "runs" / "demo" / "data"
    options = (*TINY, "method.name=mae", "train.max_steps=2", "run.dir=run", f"data.path={data}")
    return shared(factory, "tiny-mae", "pretrain", "demo", *options)
