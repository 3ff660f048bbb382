"""Result files and the folders that they go to."""

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lut_ds.errors import UserError


def writable_folder(path: Path) -> Path:
    """The folder, made where it is missing; UserError when it cannot be written, asked before the work begins."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{path}: expected a folder that can be written, found: {error.strerror or error}; give another"
        ) from error


def check_writable(**folders: Path) -> None:
    """UserError unless files can be written to the folders, by what they are for; makes nothing."""
    for what, folder in folders.items():
        place = next(each for each in (folder, *folder.parents, Path("/")) if os.path.lexists(each))
        if not place.is_dir():
            where = "" if place == folder else f" at {place}"
            raise UserError(f"{what}: {folder}: expected a folder, found a file{where}; name another")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"{what}: {folder}: expected a folder that can be written, found none at {place}; name another"
            )


def hold(fd: int) -> bool:
    """Lock an open file until it is closed; False when another process has it.

    True also where the file system has no locks (Lustre mounted without them answers ENOSYS): nothing is known there.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return True


def write_lines(path: Path, objects: Iterable[Mapping[str, Any]], indent: int | None = None) -> None:
    """Write JSON objects, a line each unless indented, whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w") as file:
        for item in objects:
            file.write(json.dumps(item, indent=indent) + "\n")
    os.replace(aside, path)
