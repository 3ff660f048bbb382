"""What a checkpoint holds, and how any world size and ZeRO stage reads it back.

Masters, moments and EMA are stored as each rank's flat tensors with the layout of parameter fragments in them. A reader
fills its own fragments from whichever files cover them, so the writer's world size and stage do not matter.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lut_ds.engine.manifest import rank_file, read_manifest
from lut_ds.engine.shards import Fragment
from lut_ds.engine.step import Trainer
from lut_ds.errors import RunFault


class HostCopies:
    """Host memory that saves copy into: kept, and pinned beside a GPU, as to allocate it anew takes longer than the copy.

    A copy is valid until the next one of the same name.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor; the copy is there after `wait`."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        return kept.copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        """Wait for the copies."""
        if self._pinned:
            torch.cuda.current_stream().synchronize()


def collect(
    trainer: Trainer, rank: int, copies: HostCopies
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """Copies of this rank's tensors, their layout, and of the tensors equal on all ranks, for `CheckpointStore.start`."""
    shards, ema, take = trainer.shards, trainer.ema, copies.take
    own: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        own["rng.cuda"] = torch.cuda.get_rng_state(trainer.device)
    owner = shards.sharded or rank == 0
    for index in range(len(shards.flats) if owner else 0):
        own |= {f"{kind}.{index}": take(f"{kind}.{index}", tensor) for kind, tensor in _kinds(trainer, index).items()}
        own[f"step.{index}"] = take(f"step.{index}", shards.moments(index)["step"].reshape(1))
    layout = {
        "fragments": [f.as_dict() for f in shards.fragments] if owner else [],
        "shapes": {name: list(shape) for name, shape in shards.shapes.items()},
        "stage": shards.stage,
    }
    buffers = {f"student.{n}": b for n, b in trainer.student.named_buffers() if "pos_embed" not in n}
    if ema is not None:
        buffers |= {f"ema.{name}": buffer for name, buffer in ema.buffers.items()}
    shared = {name: take(name, buffer) for name, buffer in buffers.items()}
    copies.wait()
    return own, {"layout": json.dumps(layout)}, shared


@torch.no_grad()
def restore(trainer: Trainer, path: Path, rank: int) -> None:
    """Load a verified checkpoint into a fresh trainer of any world size and stage.

    Raises:
        RunFault: the checkpoint does not hold this model.
    """
    reader = ShardReader(path)
    missing = sorted(set(trainer.shards.shapes) ^ set(reader.shapes))
    if missing or any(list(shape) != reader.shapes[name] for name, shape in trainer.shards.shapes.items()):
        raise RunFault(
            f"checkpoint {path}: holds another model than the recipe; first difference: {missing[0] if missing else 'a shape'}"
        )
    step = reader.scalar("step")
    for fragment in trainer.shards.fragments:
        for kind, flat in _kinds(trainer, fragment.flat).items():
            flat[fragment.offset : fragment.offset + fragment.numel].copy_(
                reader.read(kind, fragment.name, fragment.start, fragment.numel)
            )
    for index in range(len(trainer.shards.flats)):
        trainer.shards.moments(index)["step"].fill_(step)
    trainer.shards.publish()
    with safe_open(path / "shared.safetensors", "pt") as file:
        for name, buffer in trainer.student.named_buffers():
            if f"student.{name}" in file.keys():  # noqa: SIM118 - safe_open is no mapping
                buffer.copy_(file.get_tensor(f"student.{name}"))
        if trainer.ema is not None:
            for name, buffer in trainer.ema.buffers.items():
                buffer.copy_(file.get_tensor(f"ema.{name}"))
    if trainer.ema is not None:
        trainer.ema.refresh()
    own = path / rank_file(rank)
    if own.is_file():
        with safe_open(own, "pt") as file:
            torch.set_rng_state(file.get_tensor("rng.cpu"))
            if trainer.device.type == "cuda" and "rng.cuda" in file.keys():  # noqa: SIM118
                torch.cuda.set_rng_state(file.get_tensor("rng.cuda"), trainer.device)


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json."""
    return json.loads((path / "state.json").read_text())


def read_weights(path: Path, kind: str) -> dict[str, Tensor]:
    """Whole fp32 parameters and buffers of a checkpoint in our names, without a process group.

    Args:
        kind: `student` or `ema`.
    """
    reader = ShardReader(path)
    stored = {"student": "master", "ema": "ema"}[kind]
    weights = {
        name: reader.read(stored, name, 0, torch.Size(shape).numel()).view(shape)
        for name, shape in reader.shapes.items()
    }
    with safe_open(path / "shared.safetensors", "pt") as file:
        names = list(file.keys())
        weights |= {n.removeprefix(f"{kind}."): file.get_tensor(n) for n in names if n.startswith(f"{kind}.")}
    return weights


@dataclass(frozen=True)
class _Piece:
    """A stored fragment and the file it is in."""

    file: str
    fragment: Fragment


class ShardReader:
    """Reads parts of parameters from the rank files of a checkpoint."""

    def __init__(self, path: Path) -> None:
        self._files: dict[str, Any] = {}
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        self.shapes: dict[str, list[int]] = {}
        for name in sorted(n for n in read_manifest(path)["files"] if n.startswith("rank_")):
            self._files[name] = safe_open(path / name, "pt")
            layout = json.loads(self._files[name].metadata()["layout"])
            self.shapes = layout["shapes"]
            for entry in layout["fragments"]:
                self._pieces[entry["name"]].append(_Piece(name, Fragment(**entry)))

    def scalar(self, kind: str) -> float:
        """A value that is stored equally for every flat tensor, such as AdamW's step count."""
        for file in self._files.values():
            for key in file.keys():  # noqa: SIM118
                if key.startswith(f"{kind}."):
                    return float(file.get_tensor(key)[0])
        raise RunFault(f"checkpoint: holds no {kind}")

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """float32 [numel] of a parameter's flattened values from `start`.

        Raises:
            RunFault: no file holds some of them.
        """
        found = torch.empty(numel)
        covered = 0
        for low, values in self._overlaps(kind, name, start, numel):
            found[low - start : low - start + len(values)] = values
            covered += len(values)
        if covered != numel:
            raise RunFault(f"checkpoint: {kind} of {name}: expected {numel} values from {start}, found {covered}")
        return found

    def _overlaps(self, kind: str, name: str, start: int, numel: int) -> Iterator[tuple[int, Tensor]]:
        for piece in self._pieces[name]:
            f = piece.fragment
            low, high = max(start, f.start), min(start + numel, f.start + f.numel)
            if low < high:
                flat = self._files[piece.file].get_slice(f"{kind}.{f.flat}")
                yield low, flat[f.offset + low - f.start : f.offset + high - f.start]


def _kinds(trainer: Trainer, flat: int) -> dict[str, Tensor]:
    """The tensors that share the layout of a flat master."""
    moments = trainer.shards.moments(flat)
    kinds = {"master": trainer.shards.flats[flat], "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
    return kinds | ({"ema": trainer.ema.flats[flat]} if trainer.ema is not None else {})
