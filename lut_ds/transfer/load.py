"""From a run folder or checkpoint folder to an encoder: the newest checkpoint that can be trusted, and its recipe."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lut_ds.config import Recipe, parse_recipe
from lut_ds.engine.build import build_encoder, build_student
from lut_ds.engine.manifest import verify
from lut_ds.engine.state import read_state, read_weights
from lut_ds.errors import UserError
from lut_ds.method.encoder import Encoder
from lut_ds.method.lut import MAE

Kind = Literal["student", "ema"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file matches its manifest.

    Attributes:
        path: its folder.
        step, epoch: how far the run was, optimizer steps and (fractional) epochs.
        recipe: of the run that wrote it.
    """

    path: Path
    step: int
    epoch: float
    recipe: Recipe

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The weights it holds: a run without a teacher has the student's alone."""
        return ("student", "ema") if self.recipe.method.views == 2 else ("student",)


def find_checkpoint(source: str | Path, report: Callable[[str], None] | None = None) -> Checkpoint:
    """The checkpoint in a checkpoint folder, or the newest valid one of a run folder.

    Args:
        source: run folder, its `checkpoints` folder, or one `step_*` folder.
        report: takes a line about each damaged checkpoint that is passed over; standard error by default.

    Raises:
        UserError: nothing there, nothing valid there, or a recipe this version cannot read.
    """
    path = Path(source)
    if path.is_file() or not path.exists():
        found = "a file" if path.is_file() else "nothing there"
        raise UserError(f"checkpoint: {path}: expected a run folder or a checkpoint folder, found {found}")
    if (path / "manifest.json").exists() or path.name.startswith("step_"):
        problem = verify(path)
        if problem is not None:
            raise UserError(f"checkpoint: {path}: damaged: {problem}; name the run folder to use an older one")
        return open_checkpoint(path)
    candidates = _step_folders(path)
    for candidate in candidates:
        problem = verify(candidate)
        if problem is None:
            return open_checkpoint(candidate)
        (report or _to_standard_error)(f"checkpoint {candidate.name} is damaged and passed over: {problem}")
    found = f"{len(candidates)} damaged checkpoints" if candidates else "no checkpoints/step_* in it"
    raise UserError(f"checkpoint: {path}: expected a run with a finished checkpoint, found {found}; train it first")


def all_checkpoints(run: str | Path) -> list[Checkpoint]:
    """Every valid checkpoint of a run folder, oldest first; damaged ones are passed over in silence."""
    return [open_checkpoint(path) for path in reversed(_step_folders(Path(run))) if verify(path) is None]


def open_checkpoint(path: Path) -> Checkpoint:
    """A verified checkpoint folder's step and recipe."""
    state = read_state(path)
    if "recipe" not in state:
        raise UserError(
            f"checkpoint: {path / 'state.json'}: expected a recipe in it, found none; written by another tool?"
        )
    if "method" not in state["recipe"]:
        raise UserError(
            f"checkpoint: {path}: expected one of a pre-training run, found one of finetune or segment; name best/ or last/ of "
            "that run, which are there after its first evaluation"
        )
    recipe = parse_recipe(state["recipe"], str(path / "state.json"))
    return Checkpoint(path, int(state["step"]), float(state["epoch"]), recipe)


def load_encoder(checkpoint: Checkpoint, kind: Kind) -> Encoder:
    """The encoder of a checkpoint in eval mode, fp32, on the CPU.

    Args:
        kind: `student`, or `ema` for the teacher.

    Raises:
        UserError: the run has no teacher.
    """
    weights = _weights(checkpoint, kind)
    prefix = "encoder."
    encoder = build_encoder(checkpoint.recipe)
    _load(encoder, {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, checkpoint.path)
    return encoder.eval()


def load_student(checkpoint: Checkpoint, kind: Kind = "student") -> MAE:
    """The whole student of a checkpoint (encoder, decoder, heads), or the average of it, in eval mode, fp32, on the CPU."""
    student = build_student(checkpoint.recipe)
    _load(student, _weights(checkpoint, kind), checkpoint.path)
    return student.eval()


def _weights(checkpoint: Checkpoint, kind: Kind) -> dict[str, Tensor]:
    if kind not in checkpoint.kinds:
        raise UserError(
            f"checkpoint: {checkpoint.path}: a run of method {checkpoint.recipe.method.name!r} has no EMA teacher; "
            "take the student's weights (--student)"
        )
    return read_weights(checkpoint.path, kind)


def _load(module: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load strictly; position tables are computed, not stored."""
    missing, unexpected = module.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("pos_embed")]
    if missing or unexpected:
        raise UserError(
            f"checkpoint: {path}: expected the weights of its own recipe, found {len(missing)} missing and "
            f"{len(unexpected)} unknown names, first {[*missing, *unexpected][0]}; written by another version?"
        )
    broken = next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
    if broken is not None:
        raise UserError(
            f"checkpoint: {path}: expected finite weights, found NaN or infinity in {broken}; use an older one"
        )


def _step_folders(run: Path) -> list[Path]:
    """Finished checkpoint folders of a run, newest first."""
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    return sorted((p for p in folder.glob("step_*") if p.is_dir()), reverse=True)


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
