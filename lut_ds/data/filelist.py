"""A plain list of files as a source: `path`, or `path<TAB>label`, a line."""

import os
from pathlib import Path
from typing import Any

from lut_ds.data.classes import Classes, class_names, parse_label
from lut_ds.data.files import PathTable
from lut_ds.data.index_writer import IndexWriter
from lut_ds.data.shard_index import stored_root
from lut_ds.errors import UserError

SUFFIXES = (".txt", ".lst")


class FileList(PathTable):
    """The files that a list names, in its order; paths are relative to the list's folder.

    Labels are numbers, or names of classes (sorted, they are the classes; classes.txt beside the list fixes them); a line
    without one has label -1. Empty lines and lines that start with # are passed over. UserError names the line that does
    not work; 16 of the files, spread evenly, must exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.list = Path(path)
        classes = Classes(class_names(self.list.parent))
        paths: list[bytes] = []
        labels: list[int] = []
        lines: list[int] = []
        for line, text in enumerate(_lines(self.list), 1):
            if not text or text.startswith(b"#"):
                continue
            name, _, label = text.partition(b"\t")
            where = f"list {self.list}: line {line}"
            if not name or b"\0" in name:
                raise UserError(f"{where}: expected path or path<TAB>label, found {text[:60]!r}; correct the line")
            paths.append(name)
            labels.append(classes.number(parse_label(os.fsdecode(label)), where))
            lines.append(line)
        if not paths:
            raise UserError(f"list {self.list}: expected paths of images, found none; write one a line")
        names, relabel = classes.finish()
        if relabel is not None:
            labels = [int(relabel[label]) if label >= 0 else -1 for label in labels]
        super().__init__(self.list.parent, paths, labels, names)
        i = self.missing()
        if i is not None:
            raise UserError(
                f"list {self.list}: line {lines[i]}: expected an image, found nothing at {self.name(i)}; correct the path"
            )


def write_list_index(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Index a list into `out`, by default the list's name with .lut: it then opens at once, and is shared between ranks.

    Returns:
        index (its path), folders, samples, classes.
    """
    source = FileList(path)
    out = source.list.with_suffix(".lut") if out is None else Path(out)
    folders: dict[bytes, int] = {}
    with IndexWriter(out, "files", stored_root(source.list.parent, out)) as writer:
        for i in range(len(source)):
            folder, name = os.path.split(source.entry(i))
            shard = folders.get(folder)
            if shard is None:
                shard = folders[folder] = writer.add_shard(folder)
            writer.append(name, shard, label=source.label(i))
        writer.finish(source.classes)
    return {"index": str(out), "folders": len(folders), "samples": len(source), "classes": len(source.classes)}


def _lines(path: Path) -> list[bytes]:
    try:
        return [line.rstrip(b"\r") for line in path.read_bytes().split(b"\n")]
    except OSError as error:
        raise UserError(f"list {path}: cannot be read: {error.strerror or error}; check data.path") from error
