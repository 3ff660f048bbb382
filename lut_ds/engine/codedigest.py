"""Which code a run executes, as digests: that of the packages, and that of the files which a recipe names."""

import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lut_ds.data import sources
from lut_ds.method import degradations

_DIGITS = 12


def package_digest() -> str:
    """SHA-256 over the Python files of lut_ds and lut_kernels, 12 hex digits: finds what versions and commits do not."""
    digest = hashlib.sha256()
    for package in ("lut_ds", "lut_kernels"):
        folder = Path(str(resources.files(package)))
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:_DIGITS]


def own_digests(values: Mapping[str, Any]) -> dict[str, str]:
    """The same of the user's own files, a degradation or a source of images that is FILE.py:NAME, by what the recipe says.

    Args:
        values: of a recipe, by section and key.
    """
    degradation, images = values.get("method", {}).get("degradation"), values.get("data", {}).get("path")
    files = {degradation: degradations.own_file(degradation or ""), images: sources.own_file(images or "")}
    return {name: _of_file(Path(path)) for name, path in files.items() if path is not None}


def _of_file(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS]
    except OSError as error:
        return str(error.strerror or error)
