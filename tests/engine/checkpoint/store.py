"""A checkpoint store of one rank, as the tests of this folder use it."""

import json
from pathlib import Path

import torch

from lut_ds.engine.checkpoint import CheckpointStore

FILES = ["rank_00000.safetensors", "shared.safetensors", "state.json", "manifest.json"]


class Run:
    """A store in a folder, with what it reports."""

    def __init__(self, folder: Path, keep_last: int = 100, keep_every: int | None = None) -> None:
        self.folder, self.said = folder / "checkpoints", []
        self.store = CheckpointStore(self.folder, 0, 1, keep_last, keep_every, self.said.append)

    def save(self, *steps: int) -> Path:
        for step in steps:
            layout = {"fragments": [], "shapes": {}, "stage": 1}
            own = {"master.0": torch.full((64,), float(step)), "step.0": torch.tensor([float(step)])}
            shared = {"student.norm": torch.arange(4.0)}
            path = self.store.save(step, own, {"layout": json.dumps(layout)}, shared, {"epoch": step / 4})
        return path

    def newest(self) -> str | None:
        path = self.store.newest_valid()
        return None if path is None else path.name

    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in self.store.candidates())
