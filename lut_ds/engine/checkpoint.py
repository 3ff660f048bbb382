"""Checkpoint folders that can be trusted: written aside, hashed, renamed whole, verified before use.

    checkpoints/step_00000020/rank_00000.safetensors   this rank's fp32 shards and generator states
                              shared.safetensors       what is equal on all ranks
                              state.json               step and whatever the run wants back
                              manifest.json            size and SHA-256 of each file; written last
    checkpoints/latest                                 name of the newest, replaced atomically

Only safetensors and JSON: nothing in a checkpoint can execute code.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lut_ds.errors import RunFault, UserError

FORMAT = 1


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Finished checkpoints in a folder, newest first; what else lies there is not ours."""
    return sorted(
        (p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir()), reverse=True
    )


class CheckpointStore:
    """The checkpoints of one run; every method but `candidates` is a collective call of all ranks.

    Args:
        folder: `<run>/checkpoints`.
        rank, world_size: of this process.
        keep_last: newest checkpoints kept.
        keep_every: steps whose multiples are kept for ever; None keeps none beyond `keep_last`.
        report: takes one line about damaged or removed checkpoints (rank 0 only).
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        keep_last: int,
        keep_every: int | None,
        report: Callable[[str], None],
    ) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.keep_last, self.keep_every, self.report = keep_last, keep_every, report
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*folder.glob(".step_*.partial"), *folder.glob(".step_*.removed")]:
                shutil.rmtree(leftover)
        dist.barrier()

    def save(
        self,
        step: int,
        own: dict[str, Tensor],
        metadata: Mapping[str, str],
        shared: dict[str, Tensor],
        state: dict[str, Any],
    ) -> Path:
        """Write a checkpoint; on return it is complete on disk and `latest` names it.

        Args:
            step: optimizer steps done.
            own: this rank's tensors; metadata: strings stored beside them.
            shared: tensors equal on all ranks, and state: JSON values (rank 0's are written).

        Raises:
            RunFault: on every rank when any rank could not write; earlier checkpoints are untouched.
        """
        partial, final = self.folder / f".{step_name(step)}.partial", self.folder / step_name(step)

        def prepare() -> None:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()

        def write() -> dict[str, Any]:
            files = {f"rank_{self.rank:05d}.safetensors": (own, dict(metadata))}
            if self.rank == 0:
                files["shared.safetensors"] = (shared, {})
                write_json(partial / "state.json", {"step": step, **state})
            for name, (tensors, strings) in files.items():
                save_file(tensors, partial / name, strings or None)  # no tensors with empty metadata is not readable
                open_to_readers(partial / name)
            names = [*files, *(["state.json"] if self.rank == 0 else [])]
            return {name: describe_file(partial / name) for name in names}

        def publish() -> None:
            if self.rank == 0:
                files = {name: entry for part in entries for name, entry in part.items()}
                write_json(
                    partial / "manifest.json",
                    {"format": FORMAT, "step": step, "world_size": self.world_size, "files": files},
                )
                if final.exists():  # a damaged one of the same step, or the run was rewound
                    self._remove(final)
                os.replace(partial, final)
                sync_folder(self.folder)
                write_text_atomically(self.folder / "latest", final.name + "\n")
                self._retire(step)

        self._all_ranks(step, prepare)
        entries = self._all_ranks(step, write)
        self._all_ranks(step, publish)
        return final

    def newest_valid(self, before: int | None = None) -> Path | None:
        """The newest checkpoint whose every file has the size and hash its manifest names; damaged ones are reported.

        Args:
            before: of a step below this one; None: of any.
        """
        # Listings of a shared file system can differ between nodes for a while: all ranks go by rank 0's.
        listed: list[list[Path]] = [
            [p for p in self.candidates() if before is None or int(p.name.removeprefix("step_")) < before]
        ]
        dist.broadcast_object_list(listed, src=0)
        for path in listed[0]:
            problem = verify(path, self.rank, self.world_size)
            problems: list[str | None] = [None] * self.world_size
            dist.all_gather_object(problems, problem)
            if not any(problems):
                return path
            if self.rank == 0:
                self.report(f"checkpoint {path.name} is damaged and passed over: {next(p for p in problems if p)}")
        if listed[0]:
            # Starting over would empty metrics.jsonl and write over what may still be repaired.
            raise UserError(
                f"checkpoint: {self.folder}: all {len(listed[0])} checkpoints are damaged, the newest is {listed[0][0].name}; "
                "restore one, or move the step_* folders away to start from step 0"
            )
        return None

    def candidates(self) -> list[Path]:
        """Finished checkpoints, newest first."""
        return step_folders(self.folder)

    def _retire(self, newest: int) -> None:
        """Remove old checkpoints; only ever called after a newer one is complete."""
        steps = sorted(int(p.name.removeprefix("step_")) for p in step_folders(self.folder))
        for step in [s for s in steps if s <= newest][: -self.keep_last]:
            if self.keep_every is None or step % self.keep_every:
                self._remove(self.folder / step_name(step))

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint; killed in the middle, it leaves no half of one under its name."""
        aside = path.with_name(f".{path.name}.removed")
        os.replace(path, aside)
        shutil.rmtree(aside)

    def _all_ranks(self, step: int, action: Callable[[], Any]) -> list[Any]:
        """Run `action` on every rank; a failure on one is an error on all, so that nobody waits for the dead."""
        result, failure = None, None
        try:
            result = action()
        except (OSError, SafetensorError) as error:
            full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "os error 28" in str(error)
            failure = f"rank {self.rank}: {'disk full: ' if full else ''}{error}"
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, (result, failure))
        failures = [f for _, f in gathered if f]
        if failures:
            if self.rank == 0:
                shutil.rmtree(self.folder / f".{step_name(step)}.partial", ignore_errors=True)
            raise RunFault(
                f"checkpoint of step {step} not written to {self.folder}: {failures[0]}; earlier checkpoints are intact"
            )
        return [r for r, _ in gathered]


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, after it reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def open_to_readers(path: Path) -> None:
    """Give a file the permissions that the user's umask asks for; safetensors writes 0600."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        ValueError: missing, unreadable or of another format.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest.json: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ValueError(f"manifest.json: expected format {FORMAT}, found {found!r}")
    files, world_size = manifest.get("files"), manifest.get("world_size")
    if not isinstance(files, dict) or not isinstance(world_size, int):
        raise ValueError("manifest.json: expected files and world_size")
    expected = {"state.json", "shared.safetensors", *(f"rank_{rank:05d}.safetensors" for rank in range(world_size))}
    if different := expected ^ set(files):
        raise ValueError(f"manifest.json: expected the files of {world_size} ranks, {min(different)} differs")
    for name, entry in files.items():
        if not (
            isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        ):
            raise ValueError(f"manifest.json: expected size and sha256 of {name}, found {entry!r}")
    return manifest


def verify(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None. Each of `parts` callers checks its share of the files."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    for index, (name, expected) in enumerate(sorted(manifest["files"].items())):
        try:
            problem = _verify_file(path / name, expected, index % parts == part)
        except (OSError, SafetensorError) as error:
            problem = str(error)
        if problem:
            return f"{name}: {problem}"
    return None


def _verify_file(file: Path, expected: dict[str, Any], whole: bool) -> str | None:
    if not file.is_file():
        return "missing"
    if file.stat().st_size != expected["size"]:
        return f"expected {expected['size']} bytes, found {file.stat().st_size}"
    if whole and describe_file(file)["sha256"] != expected["sha256"]:
        return "content does not match its SHA-256"
    if whole and file.suffix == ".safetensors":
        with safe_open(file, "pt"):  # raises for anything else, such as a pickle
            return None
    return None


def write_json(path: Path, value: Any) -> None:
    """Write JSON and wait until it is on the disk."""
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step, so that a reader never sees half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
