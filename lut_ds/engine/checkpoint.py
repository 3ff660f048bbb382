"""Checkpoint folders that can be trusted: written aside, hashed, read back, renamed whole, verified before use.

    checkpoints/step_00000020/rank_00000.safetensors   this rank's fp32 shards and generator states
                              shared.safetensors       what is equal on all ranks
                              state.json               step and whatever the run wants back
                              manifest.json            size and SHA-256 of each file; written last
    checkpoints/latest                                 name of the newest, replaced atomically

Only safetensors and JSON: nothing in a checkpoint can execute code.

A save has two phases, each on a thread of its own beside the steps: every rank writes its files, reads them back and
compares; then rank 0 publishes (manifest, rename, `latest`) and only then removes what is no longer kept. Between them,
and after them, the ranks agree. Killed at any instant, a run has either its old newest checkpoint or the new one, whole.
"""

import errno
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lut_ds.engine.files import sync_folder, write_json, write_tensors, write_text_atomically
from lut_ds.engine.manifest import FORMAT, rank_file, step_folders, step_name, verify, verify_file
from lut_ds.engine.sharedfolder import check_shared
from lut_ds.errors import RunFault, UserError


@dataclass(frozen=True)
class Saved:
    """A finished save: its folder, size in bytes over all ranks, seconds of the slowest rank's writing and of publishing."""

    step: int
    path: Path
    size: int
    write_seconds: float
    publish_seconds: float


@dataclass
class _Save:
    """A save in flight; `files` is what all ranks wrote, once they agreed on it."""

    step: int
    partial: Path
    job: Future[Any]
    files: dict[str, Any] | None = None
    write_seconds: float = 0.0


class CheckpointStore:
    """The checkpoints of one run. `save`, `start`, `advance`, `finish` and `newest_valid` are collective calls of all ranks.

    Args:
        folder: `<run>/checkpoints`.
        rank, world_size: of this process.
        keep_last: newest checkpoints kept.
        keep_every: steps whose multiples are kept for ever; None keeps none beyond `keep_last`.
        report: takes one line about damaged or removed checkpoints (rank 0 only).
    """

    # A network file system may show another node's files this much later, seconds.
    PATIENCE = 60.0

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
        self._save: _Save | None = None
        self._cancel = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*folder.glob(".step_*.partial"), *folder.glob(".step_*.removed")]:
                shutil.rmtree(leftover, ignore_errors=True)  # what cannot be removed now is only not looked at
        # A rank of an earlier start that is slow to die must not write into this start's folders.
        token = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token, src=0)
        self._token = token[0]
        check_shared(folder, rank, world_size, self.PATIENCE)

    @property
    def in_flight(self) -> bool:
        """Whether a save was started and not finished; the same on all ranks."""
        return self._save is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread still works on it."""
        return self._save is not None and not self._save.job.done()

    def save(
        self,
        step: int,
        own: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        shared: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Path:
        """`start` and `finish`: on return the checkpoint is complete on disk and `latest` names it."""
        self.start(step, own, metadata, shared, state)
        saved = self.finish()
        assert saved is not None
        return saved.path

    def start(
        self,
        step: int,
        own: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        shared: Mapping[str, Tensor],
        state: Mapping[str, Any],
        expected_bytes: int | None = None,
    ) -> None:
        """Begin a save in the background; one that is in flight is finished first.

        Args:
            step: optimizer steps done.
            own: this rank's tensors; metadata: strings stored beside them.
            shared: tensors equal on all ranks, and state: JSON values (rank 0's are written). No tensor may change until
                the save is finished.
            expected_bytes: what all ranks will write together; None: this rank's share times the ranks.

        Raises:
            RunFault: the one in flight failed.
        """
        self.finish()
        partial = self.folder / f".{step_name(step)}.{self._token}.partial"
        need = expected_bytes or self.world_size * sum(t.numel() * t.element_size() for t in own.values())

        def write() -> tuple[dict[str, Any], float]:
            begun = time.monotonic()
            partial.mkdir(parents=True, exist_ok=True)
            _check_space(partial, need)
            name, cancelled = rank_file(self.rank), self._cancel.is_set
            files = {name: write_tensors(partial / name, own, metadata, cancelled)}
            if self.rank == 0:
                name = "shared.safetensors"
                files[name] = write_tensors(partial / name, shared, {}, cancelled)
                files["state.json"] = write_json(partial / "state.json", {"step": step, **state})
            return files, time.monotonic() - begun

        self._save = _Save(step, partial, self._pool.submit(write))

    def advance(self) -> Saved | None:
        """Take the save in flight to its next phase, waiting for the slowest rank; returns it when it is finished.

        Without waiting if no rank is busy: ranks that vote with every step know that.

        Raises:
            RunFault: on every rank when any rank could not write; earlier checkpoints are untouched.
        """
        save = self._save
        if save is None:
            return None
        results = self._agree(save)
        if save.files is None:
            save.files = {name: entry for files, _ in results for name, entry in files.items()}
            save.write_seconds = max(seconds for _, seconds in results)
            save.job = self._pool.submit(self._publish, save.step, save.partial, save.files)
            return None
        self._save = None
        size = sum(entry["size"] for entry in save.files.values())
        return Saved(save.step, self.folder / step_name(save.step), size, save.write_seconds, results[0])

    def finish(self) -> Saved | None:
        """Wait until the save in flight, if any, is complete on disk.

        Raises:
            RunFault: as `advance`.
        """
        saved = None
        while self._save is not None:
            saved = self.advance()
        return saved

    def close(self) -> None:
        """Give up what is in flight, without the other ranks; safe to call twice."""
        self._cancel.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def newest_valid(self, before: int | None = None) -> Path | None:
        """The newest checkpoint whose every file has the size and hash its manifest names; damaged ones are reported.

        Args:
            before: of a step below this one; None: of any.
        """
        self.finish()
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

    def _agree(self, save: _Save) -> list[Any]:
        """Every rank's result of a phase; a failure on one is an error on all, so that nobody waits for the dead."""
        result, failure = None, None
        try:
            result = save.job.result()
        except OSError as error:
            full = "disk full: " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            failure = (
                f"rank {self.rank}: {full}{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            )
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, (result, failure))
        failures = [f for _, f in gathered if f]
        if failures:
            self._save = None
            if self.rank == 0:
                shutil.rmtree(save.partial, ignore_errors=True)
            raise RunFault(
                f"checkpoint of step {save.step} not written to {self.folder}: {failures[0]}; earlier checkpoints are intact"
            )
        return [r for r, _ in gathered]

    def _publish(self, step: int, partial: Path, files: dict[str, Any]) -> float:
        """Make the written files a checkpoint (rank 0); returns the seconds it took."""
        begun = time.monotonic()
        if self.rank == 0:
            self._see_all(partial, files)
            write_json(
                partial / "manifest.json",
                {"format": FORMAT, "step": step, "world_size": self.world_size, "files": files},
            )
            sync_folder(partial)
            final = self.folder / step_name(step)
            replaced = _set_aside(final) if final.exists() else None  # a damaged one, or the run was rewound
            os.replace(partial, final)
            sync_folder(self.folder)
            write_text_atomically(self.folder / "latest", final.name + "\n")
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)
            self._retire(step)
        return time.monotonic() - begun

    def _see_all(self, partial: Path, files: dict[str, Any]) -> None:
        """Wait until every rank's file is there in full, as this node sees it."""
        deadline = time.monotonic() + self.PATIENCE
        for name, entry in files.items():
            while problem := verify_file(partial / name, entry, whole=False):
                if time.monotonic() > deadline or self._cancel.wait(0.5):
                    raise OSError(
                        errno.ENOENT,
                        f"another rank's {name} is not seen from rank 0 ({problem}): run.dir must be one folder that all nodes share",
                    )

    def _retire(self, newest: int) -> None:
        """Remove old checkpoints; only ever called after a newer one was read back and published."""
        steps = sorted(int(p.name.removeprefix("step_")) for p in step_folders(self.folder))
        for step in [s for s in steps if s <= newest][: -self.keep_last]:
            if self.keep_every is None or step % self.keep_every:
                shutil.rmtree(_set_aside(self.folder / step_name(step)), ignore_errors=True)


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint that goes: killed while removing it, no half of one is left under its name."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.removed")
    os.replace(path, aside)
    return aside


def _check_space(partial: Path, need: int) -> None:
    """Refuse to begin what will not fit.

    Args:
        need: bytes of all ranks together; what some wrote already is counted.
    """
    need += need // 100 + (1 << 14)  # headers, state, and the file system's own
    free = shutil.disk_usage(partial).free + sum(file.stat().st_size for file in partial.iterdir())
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"{need / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free; free space, or lower run.keep_last, and run again",
        )
