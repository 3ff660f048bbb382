"""From labels as they are written (numbers or names) to class indices."""

import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lut_ds.errors import UserError

CLASSES_NAME = "classes.txt"  # beside shards or a list: one class a line, in the order of the labels
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}")
_MOST = 1 << 20  # classes: a number label above is a mistake, and would make as many names


class Classes:
    """Gives each label a number as it comes; `finish` names the classes.

    Number labels stay what they are. Names are numbered as they come, and in the end by their sorted order, so the same
    names are the same classes in any order of samples. With `known` names both kinds may be used, and no others.
    """

    def __init__(self, known: list[str] | None = None) -> None:
        self._known = known
        self._numbers: dict[str, int] = {name: i for i, name in enumerate(known or [])}
        self._largest = -1
        self._kind: type | None = None

    def number(self, label: int | str | None, where: object) -> int:
        """The number of a label, -1 for None; UserError, naming `where`, when it does not fit the others."""
        if label is None:
            return -1
        if self._known is None and self._kind not in (None, type(label)):
            raise UserError(
                f"{where}: label {label!r}: expected labels to be all numbers or all names, found both; write one kind, or "
                "classes.txt beside them"
            )
        self._kind = type(label)
        if isinstance(label, str):
            if self._known is not None and label not in self._numbers:
                raise UserError(
                    f"{where}: label {label!r}: expected a class of classes.txt; add it there or correct it"
                )
            return self._numbers.setdefault(label, len(self._numbers))
        most = _MOST if self._known is None else len(self._known)
        if not 0 <= label < most:
            raise UserError(
                f"{where}: label {label}: expected a number from 0 to {most - 1}; correct it, or classes.txt"
            )
        self._largest = max(self._largest, label)
        return label

    def finish(self) -> tuple[list[str], NDArray[np.int32] | None]:
        """The names of the classes, and what the numbers given for names became: int32 [names], None for no change."""
        if self._known is not None:
            return self._known, None
        if self._kind is str:
            names = sorted(self._numbers)
            relabel = np.zeros(len(names), np.int32)
            relabel[[self._numbers[name] for name in names]] = np.arange(len(names), dtype=np.int32)
            return names, relabel
        return [str(i) for i in range(self._largest + 1)], None


def parse_label(text: str) -> int | str | None:
    """A label as it is written: a number in digits alone (`2020_01` is a name), a name, None for nothing."""
    text = text.strip()
    return int(text) if _NUMBER.fullmatch(text) else text or None


def check_class_names(names: list[str]) -> None:
    """UserError for a name that a line of classes.txt cannot hold."""
    for name in names:
        if "\n" in name or name.endswith("\r"):
            raise UserError(
                f"class {name!r}: expected a name without line breaks, as {CLASSES_NAME} has one a line; rename its folder"
            )


def write_class_names(folder: Path, names: list[str]) -> None:
    """Write classes.txt; see check_class_names."""
    check_class_names(names)
    (folder / CLASSES_NAME).write_bytes(b"".join(os.fsencode(name) + b"\n" for name in names))


def class_names(folder: Path) -> list[str] | None:
    """The lines of classes.txt in `folder`, None where there is none; UserError when one is empty or comes twice."""
    path = folder / CLASSES_NAME
    if not path.is_file():
        return None
    names = [os.fsdecode(line.rstrip(b"\r")) for line in path.read_bytes().removesuffix(b"\n").split(b"\n")]
    if len(set(names)) < len(names) or not all(names):
        raise UserError(f"{path}: expected one class a line, each once, found an empty or repeated line; correct it")
    return names
