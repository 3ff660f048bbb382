"""Result files of the data tools."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_lines(path: Path, objects: Iterable[Mapping[str, Any]], indent: int | None = None) -> None:
    """Write JSON objects, a line each unless indented, whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w") as file:
        for item in objects:
            file.write(json.dumps(item, indent=indent) + "\n")
    os.replace(aside, path)
