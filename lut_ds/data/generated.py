"""Data sets that are made, not downloaded: written aside, complete or not there, never over somebody's files."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lut_ds.errors import UserError


def write_set(path: Path, kind: str, settings: dict[str, Any], write: Callable[[Path], list[str]]) -> Path:
    """Write a data set into `path`, with `<kind>.json` that lists its files; returns `path`.

    A folder that is already complete with these settings is left alone, one of ours that is not is written again.

    Args:
        kind: what is made.
        settings: all that the files depend on; JSON.
        write: puts the files below the folder that it is given, and returns their names relative to it.

    Raises:
        UserError: `path` holds something else.
    """
    path, manifest = Path(path), f"{kind}.json"
    if _complete(path / manifest, settings):
        return path
    if path.exists() and not (path / manifest).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{kind}: {path}: expected an empty or missing folder, found other files; give another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        aside.chmod(0o755)  # mkdtemp makes it private
        files = {name: (aside / name).stat().st_size for name in write(aside)}
        (aside / manifest).write_text(json.dumps({**settings, "files": files}))
        _put_in_place(aside, path, manifest, settings)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def _complete(manifest: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder has every file of its manifest, with its length, made with these settings."""
    try:
        found = json.loads(manifest.read_text())
        files = found.pop("files")
        return found == settings and all((manifest.parent / f).stat().st_size == n for f, n in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _put_in_place(aside: Path, path: Path, manifest: str, settings: dict[str, Any]) -> None:
    """Rename, replacing a broken set of ours; another process that was faster is as good."""
    if (path / manifest).is_file() and not _complete(path / manifest, settings):
        shutil.rmtree(path)
    try:
        os.rename(aside, path)
    except OSError:
        if not _complete(path / manifest, settings):
            raise
