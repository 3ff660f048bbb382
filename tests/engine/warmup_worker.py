"""A rank that checks its allocation: prints the report as JSON, or the refusal. The arguments say what differs on rank 1."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lut_ds.config import Recipe
from lut_ds.engine import runfolder, warmup
from lut_ds.engine.launch import discover_ranks, process_group
from lut_ds.errors import UserError


class Images:
    """Ten images, or nine; all readable, or none."""

    def __init__(self, count: int, readable: bool) -> None:
        self._count, self._readable = count, readable

    def __len__(self) -> int:
        return self._count

    classes: ClassVar[list[str]] = []

    def label(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        return f"{index:04d}.jpg"

    def read(self, index: int) -> bytes:
        if not self._readable:
            raise OSError(f"no such file: {index:04d}.jpg")
        return b"jpeg"


def main(wrong: Sequence[str]) -> None:
    """Join, check, print."""
    ranks = discover_ranks()
    here = set(wrong) if ranks.rank == 1 else set()
    if "version" in here:
        runfolder.PACKAGES = (*runfolder.PACKAGES[1:], "pytest")
    recipe = Recipe()
    recipe.optim.blr = 9.0 if "recipe" in here else recipe.optim.blr
    recipe.method.degradation = "own.py:Own"
    source = Images(9 if "images" in here else 10, "unreadable" not in here)
    with tempfile.TemporaryDirectory() as node, process_group(ranks):
        os.chdir(node)  # as on a node of its own, whose disk has the user's files
        Path("own.py").write_text("# changed\n" if "file" in here else "# as the user wrote it\n")
        try:
            print(json.dumps(warmup.check_allocation(ranks, recipe, source)))
        except UserError as error:
            print(f"refused: {error}")


main(sys.argv[1:])
