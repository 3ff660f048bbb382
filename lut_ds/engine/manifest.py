"""What a finished checkpoint folder is: its name, its manifest, and whether its files are what the manifest says."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lut_ds.engine.files import describe_file

FORMAT = 1


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def step_folders(folder: Path) -> list[Path]:
    """Finished checkpoints in a folder, newest first; what else lies there is not ours."""
    return sorted(
        (p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir()), reverse=True
    )


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
        newer = ", written by a newer lut_ds" if isinstance(found, int) and found > FORMAT else ""
        raise ValueError(f"manifest.json: expected format {FORMAT}, found {found!r}{newer}")
    files, world_size = manifest.get("files"), manifest.get("world_size")
    if not isinstance(files, dict) or not isinstance(world_size, int):
        raise ValueError("manifest.json: expected files and world_size")
    expected = {"state.json", "shared.safetensors", *map(rank_file, range(world_size))}
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
            problem = verify_file(path / name, expected, index % parts == part)
        except (OSError, SafetensorError) as error:
            problem = str(error)
        if problem:
            return f"{name}: {problem}"
    return None


def verify_file(file: Path, expected: dict[str, Any], whole: bool) -> str | None:
    """What is wrong with a file: missing, of another size, or (with `whole`, which reads it) of other content."""
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
