"""When a run's state is saved and loaded, what that costs, and whether a checkpoint belongs to the run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lut_ds import __version__
from lut_ds.config import RunRecipe
from lut_ds.engine import state
from lut_ds.engine.checkpoint import CheckpointStore, Saved
from lut_ds.engine.launch import Ranks
from lut_ds.engine.manifest import read_manifest
from lut_ds.engine.runfolder import recipe_difference, tracker_id
from lut_ds.engine.step import Trainer
from lut_ds.errors import UserError
from lut_ds.tracking import EventLog


class Saver:
    """Saves beside the steps; every method is a call of all ranks at the same step.

    Args:
        recipe: of the run.
        ranks: this process's place.
        folder: the run folder.
        steps_per_epoch: of the data.
        say: shows a line (rank 0).
        events: where saves are recorded; None on other ranks.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        ranks: Ranks,
        folder: Path,
        steps_per_epoch: int,
        say: Callable[[str], None],
        events: EventLog | None,
    ) -> None:
        self._recipe, self._ranks, self._folder = recipe, ranks, folder
        self._per_epoch, self._say, self._events = steps_per_epoch, say, events
        keep = recipe.run.keep_every_epochs
        self._store = CheckpointStore(
            folder / "checkpoints",
            ranks.rank,
            ranks.world_size,
            recipe.run.keep_last,
            keep * steps_per_epoch if keep else None,
            say,
        )
        self._copies = state.HostCopies(ranks.device)
        self._stall = 0.0
        self.slowest = 0.0
        """Seconds that the slowest save of this process took from its step to the disk."""

    @property
    def busy(self) -> bool:
        """Whether this rank still writes; its vote in the next step."""
        return self._store.busy

    def find(self, before: int | None = None) -> tuple[Path, dict[str, Any]] | None:
        """The newest valid checkpoint (of a step below `before`) and its state.json; None if there is no checkpoint.

        Raises:
            UserError: all checkpoints are damaged, or it is of another recipe or other data.
        """
        self.finish()
        path = self._store.newest_valid(before)
        if path is None:
            return None
        stored = state.read_state(path)
        self._check_origin(path, stored)
        return path, stored

    def load(self, trainer: Trainer, path: Path) -> None:
        """Load what `find` found into a trainer.

        Raises:
            RunFault: it does not hold this model.
        """
        state.restore(trainer, path, self._ranks.rank)

    def report_resume(self, path: Path, stored: dict[str, Any]) -> None:
        """Say and record that a run goes on, and on how many ranks; keep its trackers' id."""
        if self._events is None:
            return
        tracker_id(self._folder, stored.get("tracker_id"))
        before, now = read_manifest(path)["world_size"], self._ranks.world_size
        resized = f", resized {before} -> {now} ranks" if before != now else ""
        self._say(f"continuing {self._folder} from {path.name}{resized}")
        self._events.write("resumed", step=stored["step"], ranks_before=before, ranks=now)

    def save(self, step: int, trainer: Trainer, extra: dict[str, Any], wait: bool) -> None:
        """Copy the state of `step` and write it in the background; a save that is still in flight is finished first.

        Args:
            extra: JSON values that the run wants back in the checkpoint's state.
            wait: return when it is complete on disk.

        Raises:
            RunFault: this save (with `wait`) or the one before failed.
        """
        begun = time.monotonic()
        if self._store.in_flight:
            self.finish()
            waited = time.monotonic() - begun
            if waited > 1:
                self._say(
                    f"step {step}: waited {waited:.1f} s for the checkpoint before; raise run.save_every to save less often"
                )
            begun += waited
        own, metadata, shared = state.collect(trainer, self._ranks.rank, self._copies)
        size = sum(tensor.nbytes for tensor in own.values()) * (self._ranks.world_size if trainer.shards.sharded else 1)
        self._store.start(step, own, metadata, shared, {**self._content(step), **extra}, size)
        self._stall = time.monotonic() - begun
        if wait or not self._recipe.run.async_save:
            self.finish()

    def advance(self, busy: bool) -> None:
        """Take the save in flight further unless some rank is `busy` with it, as the ranks' votes say.

        Raises:
            RunFault: it failed.
        """
        if self._store.in_flight and not busy:
            saved = self._store.advance()
            if saved is not None:
                self._report_save(saved)

    def finish(self) -> None:
        """Wait until the save in flight, if any, is complete on disk.

        Raises:
            RunFault: it failed.
        """
        saved = self._store.finish()
        if saved is not None:
            self._report_save(saved)

    def close(self) -> None:
        """Give up what is in flight; safe to call twice."""
        self._store.close()

    def _content(self, step: int) -> dict[str, Any]:
        return {
            "epoch": step / self._per_epoch,
            "seed": self._recipe.run.seed,
            "recipe": self._recipe.model_dump(mode="json"),
            "tracker_id": tracker_id(self._folder) if self._ranks.main else None,
            "version": __version__,
        }

    def _check_origin(self, path: Path, stored: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run, and other data: order and schedules are functions of its amount."""
        if not isinstance(stored.get("recipe"), dict):
            raise UserError(
                f"checkpoint: {path / 'state.json'}: expected a recipe in it, found none; move {path.name} away"
            )
        difference = recipe_difference(stored["recipe"], self._recipe)
        if difference:
            raise UserError(
                f"checkpoint: {path}: written by another recipe: {difference}; move it away, or name another run.dir"
            )
        per_epoch = round(stored["step"] / stored["epoch"]) if stored["epoch"] else self._per_epoch
        if per_epoch != self._per_epoch:
            raise UserError(
                f"data.path: expected the data of this run, {per_epoch} steps an epoch, found {self._per_epoch}; "
                "name the same images, or another run.dir"
            )

    def _report_save(self, saved: Saved) -> None:
        on_disk = self._stall + saved.write_seconds + saved.publish_seconds
        self.slowest = max(self.slowest, on_disk)
        if self._events is None:
            return
        self._say(
            f"checkpoint {saved.path.name}: {saved.size / 1e9:.3g} GB, steps stood still {self._stall:.2f} s, "
            f"written in {saved.write_seconds + saved.publish_seconds:.2f} s"
        )
        self._events.write(
            "saved",
            step=saved.step,
            bytes=saved.size,
            stall_s=round(self._stall, 4),
            write_s=round(saved.write_seconds, 4),
            publish_s=round(saved.publish_seconds, 4),
        )
