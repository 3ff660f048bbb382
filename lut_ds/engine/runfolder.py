"""The run folder: resolved recipe, environment, metrics, checkpoints; and whether it may be continued."""

import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import yaml

from lut_ds.config import RunRecipe
from lut_ds.engine.files import write_text_atomically
from lut_ds.engine.manifest import step_folders
from lut_ds.errors import RunFault, UserError

# What may differ between a run and its continuation: how it is distributed, watched and stopped, not what is learned.
FREE = {
    "data.path",
    "data.threads",
    "data.eval_batch",
    "data.prefetch",
    "data.hw_decoder_load",
    "data.max_bad_share",
    "data.retry_seconds",
    "train.max_steps",
    "train.micro_batch",
    "train.deepspeed",
    "train.deepspeed_override",
    "train.activation_checkpointing",
    "train.compile",
    "precision.teacher",
}
PACKAGES = (
    "torch",
    "deepspeed",
    "timm",
    "triton",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "numpy",
    "wandb",
    "lut-ds",
)


def run_folder(recipe: RunRecipe, recipe_name: str) -> Path:
    """Folder of a run: `run.dir`, or runs/<recipe>."""
    return Path(recipe.run.dir) if recipe.run.dir else Path("runs") / Path(recipe_name).stem


def open_run_folder(folder: Path, recipe: RunRecipe, notes: dict[str, Any] | None = None) -> TextIO:
    """Create the folder, or check that it holds a run of the same recipe; write the resolved recipe and environment.

    Args:
        folder, recipe: the run.
        notes: further keys of this start's line in environment.jsonl.

    Returns:
        The folder's lock: it is ours until this is closed, or the process ends.

    Raises:
        UserError: it holds something else, a run of another recipe (the first differing key is named), or a run that is
            going on.
    """
    check_run_folder(folder, recipe)
    stored = folder / "recipe.yaml"
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = claim(folder, "run.dir")
        write_text_atomically(stored, yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False))
        with (folder / "environment.jsonl").open("a") as file:
            file.write(json.dumps(environment() | (notes or {})) + "\n")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFault(f"run.dir: {folder}: disk full: {error}; free space and run again") from error
        raise UserError(f"run.dir: {folder} cannot be written: {error}; name another folder") from error
    return lock


def check_run_folder(folder: Path, recipe: RunRecipe) -> None:
    """Refuse a folder that holds something else or a run of another recipe; changes nothing.

    Raises:
        UserError: see `open_run_folder`.
    """
    stored = stored_recipe(folder)
    difference = recipe_difference(stored, recipe) if stored is not None else None
    if difference is not None:
        raise UserError(
            f"run.dir: {folder} holds a run of another recipe: {difference}; name another run.dir, or give the same recipe "
            "to continue"
        )
    if not (folder / "recipe.yaml").is_file() and folder.exists() and (not folder.is_dir() or _strangers(folder)):
        raise UserError(
            f"run.dir: {folder} exists and is no run folder (it has no recipe.yaml); name a new or empty folder"
        )


def stored_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of the run that a folder holds; None where no run has begun, which leaves nothing to protect.

    Raises:
        UserError: it cannot be read.
    """
    stored = folder / "recipe.yaml"
    if not stored.is_file() or not _began(folder):
        return None
    try:
        old = yaml.safe_load(stored.read_text())
        assert isinstance(old, dict)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AssertionError) as error:
        raise UserError(f"run.dir: {stored} is not readable; name another folder") from error
    return old


def _began(folder: Path) -> bool:
    """Whether a run left anything there that another recipe would damage: a recorded step or a checkpoint."""
    metrics = folder / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(step_folders(folder / "checkpoints"))


def _strangers(folder: Path) -> bool:
    """Whether a folder without a recipe holds more than what opening it, cut short, leaves behind."""
    ours = {"checkpoints", ".lock", "submit"}
    return _began(folder) or any(
        p.name not in ours and not p.name.startswith(".recipe.yaml.") for p in folder.iterdir()
    )


def claim(folder: Path, key: str) -> TextIO:
    """Lock a folder; the system releases it when the process ends, however it ends.

    Args:
        key: what names the folder, for the message.

    Raises:
        UserError: another process has it.
    """
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise UserError(
            f"{key}: {folder} is in use by {owner or 'another process'}; wait for it, or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in (
            errno.ENOLCK,
            errno.ENOSYS,
            errno.EOPNOTSUPP,
        ):  # a file system without locks: go on without
            raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def recipe_difference(stored: dict[str, Any], recipe: RunRecipe) -> str | None:
    """The first key of what is learned whose value is another in a stored recipe, with both values; None if there is none."""
    new, defaults = (json.loads(r.model_dump_json()) for r in (recipe, type(recipe)()))
    for section in new:
        old = stored.get(section)
        for key, value in new[section].items():
            name = f"{section}.{key}"
            if section == "guard" or (section == "run" and key != "seed") or name in FREE:
                continue
            default = defaults[section][key]  # a key younger than the run had its default
            there = old.get(key, default) if isinstance(old, dict) else default
            if name == "method.degradation":  # a file of the user's may be reached by another path
                there, value = (str(degradation).rpartition("/")[2] for degradation in (there, value))
            if there != value:
                return f"{name} is {there!r} there and {value!r} here"
    return None


def environment() -> dict[str, Any]:
    """Versions, machine, command and git state, for the record."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "git": git_state(Path(__file__).parent),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes and how fast, where they are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree has changes, if `folder` is in a git checkout."""
    if shutil.which("git") is None:
        return None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    if commit.returncode:
        return None
    status = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=False
    )
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def tracker_id(folder: Path, known: str | None = None) -> str:
    """The run's id for trackers: made once, kept in the run folder and in checkpoints (`known`: the one found there)."""
    file = folder / "tracker_id"
    if not file.is_file():
        write_text_atomically(file, (known or uuid.uuid4().hex[:12]) + "\n")
    return file.read_text().strip()
