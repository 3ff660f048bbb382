"""What was measured before: one line a condition, appended when it is done, found again by what it depends on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lut_ds.transfer.features import data_identity
from lut_ds.transfer.robustness.sets import ImageSet

_VERSION = 1  # of what is measured; one more when numbers change


class Kept:
    """The file measured.jsonl of an output folder.

    Args:
        path: the file; one that is not there is empty, and a line that a crash cut short does not count.
        fingerprint: of the classifier.
        limit, seed: of the request.
    """

    def __init__(self, path: Path, fingerprint: str, limit: int | None, seed: int) -> None:
        self._path = path
        self._parts = [_VERSION, fingerprint, limit, seed]
        self._identities: dict[int, str] = {}
        self._found: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                record = json.loads(line)
                self._found[record["key"]] = record["result"]
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, condition: str, images: ImageSet) -> dict[str, Any] | None:
        """The result of a condition on a set, None where it was not measured."""
        return self._found.get(self._key(condition, images))

    def put(self, condition: str, images: ImageSet, result: dict[str, Any]) -> None:
        """Append a result."""
        key = self._key(condition, images)
        self._found[key] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            file.seek(0, 2)
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # end what a crash cut short
                    file.write(b"\n")
            file.write(json.dumps({"key": key, "condition": condition, "result": result}).encode() + b"\n")

    def _key(self, condition: str, images: ImageSet) -> str:
        identity = self._identities.get(id(images))
        if identity is None:
            digest = hashlib.sha256(data_identity(images.source).encode())
            digest.update(images.targets.tobytes() + images.groups.tobytes())
            identity = self._identities[id(images)] = digest.hexdigest()
        text = json.dumps([*self._parts, condition, identity, images.crop])
        return hashlib.sha256(text.encode()).hexdigest()[:32]
