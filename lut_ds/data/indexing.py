"""`lut-ds data index`: the indices of shards, folders and lists, written, exported and compared with the data."""

import os
from pathlib import Path
from typing import Any, Literal

from lut_ds.data.files import IndexedFiles
from lut_ds.data.folder import split_root
from lut_ds.data.index import SampleIndex
from lut_ds.data.outputs import writable_folder
from lut_ds.data.progress import progress_bar
from lut_ds.data.shard_index import check_index, list_shards
from lut_ds.data.sources import ImageFolder, index_source
from lut_ds.data.wds2idx import idx_paths, write_idx
from lut_ds.errors import UserError

_SHOWN = 10  # differences that people see; --json has them all


def index(path: str, out: Path | None, split: Literal["train", "val"], workers: int) -> tuple[dict[str, Any], str]:
    """Write the index of `path`; what `index_source` returns, and a line for people."""
    with progress_bar("index", 0, unit="item") as bar:
        result = index_source(
            path, out, split, workers=workers, progress=lambda done, total: _advance(bar, done, total)
        )
    return result, f"wrote {result['index']}: {result['samples']:,} samples, {result['classes']:,} classes"


def export_idx(path: str, split: Literal["train", "val"]) -> tuple[dict[str, Any], str]:
    """Write an .idx file beside every shard of `path`."""
    shards = list_shards(_root(path, split))
    files = idx_paths(shards)
    writable_folder(files[0].parent)
    samples = 0
    with progress_bar("wds2idx", len(shards), unit="shard") as bar:
        for shard, file in zip(shards, files):
            samples += write_idx(shard, file)
            bar.update()
    result = {"files": [str(file) for file in files], "samples": samples}
    return result, f"wrote {len(shards):,} .idx files: {samples:,} samples"


def check(path: str, split: Literal["train", "val"], workers: int) -> tuple[list[str], str]:
    """Compare an index with its shards (headers and labels), or with its folder (names); the differences."""
    found = SampleIndex.open(_root(path, split))
    with progress_bar("check", 0, unit="item") as bar:
        if found.kind == "tar":
            problems = check_index(found.path, workers=workers, progress=lambda done, total: _advance(bar, done, total))
        else:
            problems = _check_files(found)
    if not problems:
        return [], f"{found.path}: {len(found):,} samples, as the data have them"
    more = [f"... and {len(problems) - _SHOWN:,} more"] if len(problems) > _SHOWN else []
    return problems, "\n".join([f"{len(problems):,} differences; write the index again", *problems[:_SHOWN], *more])


def _check_files(found: SampleIndex) -> list[str]:
    """Files of the index that are gone; for that of a whole folder also images which it does not have."""
    found.check_content()
    source = IndexedFiles(found)
    listed = {source.path(i) for i in range(len(source))}
    problems = [f"{os.fsdecode(path)}: no such file" for path in sorted(listed) if not os.path.lexists(path)]
    if found.selection:
        return problems
    try:
        folder = ImageFolder(found.root, None)
    except UserError as error:
        return [*problems, str(error)]
    present = {folder.path(i) for i in range(len(folder))}
    return problems + [f"{os.fsdecode(path)}: not in the index" for path in sorted(present - listed)]


def _root(path: str, split: Literal["train", "val"]) -> Path:
    """The folder of the split where there is one; a file or pattern as it is."""
    return split_root(Path(path), split) if os.path.isdir(path) else Path(path)


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total or None
    bar.update(done - bar.n)
