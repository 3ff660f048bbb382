"""Indexing tar shards, and checking that an index still describes them."""

import functools
import glob
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lut_ds.data.classes import Classes, class_names
from lut_ds.data.index import INDEX_NAME, SampleIndex
from lut_ds.data.index_writer import IndexWriter
from lut_ds.data.wds import ShardScan, scan_shard
from lut_ds.errors import UserError

Progress = Callable[[int, int], None]  # done, of how many (0: not known)


def list_shards(path: Path) -> list[Path]:
    """The .tar files of a folder, of a pattern such as DIR/train-*.tar, or one file; sorted by name.

    UserError when there are none.
    """
    if path.is_dir():
        shards = sorted(shard for shard in path.iterdir() if is_shard(shard.name))
    elif path.is_file():
        shards = [path]
    else:
        shards = [Path(name) for name in sorted(glob.glob(os.fspath(path)))]
    if not shards:
        raise UserError(f"data.path: {path}: expected .tar shards, found none; check the path")
    return shards


def is_shard(name: str) -> bool:
    """Whether a file of this name is a shard."""
    return name.endswith(".tar") and not name.startswith(".")


def write_index(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Index the shards of `path` (see `list_shards`) into `out`; for a whole folder that is index.lut in it unless given.

    Labels come from `key.cls` or `key.json`; number labels are named by classes.txt beside the shards where that exists.
    `workers` above 1 are processes. Interrupted, it leaves nothing behind.

    Returns:
        index (its path), shards, samples, bytes (of the images), classes, without_image (samples that have none).

    Raises:
        UserError: a shard is damaged (shard and offset are named), a label cannot be read, or `out` cannot be written.
    """
    shards = list_shards(Path(path))
    if out is None and not Path(path).is_dir():
        raise UserError(
            f"data.path: {path}: expected an output for an index of some shards of a folder; give one, as train.lut"
        )
    out = Path(path) / INDEX_NAME if out is None else Path(out)
    return build(shards, out, scan_shard, workers=workers, progress=progress)


def build(
    shards: Sequence[Path],
    out: Path,
    scan: Callable[[Path], ShardScan],
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Index shards with what `scan` finds in each; see `write_index`."""
    root = Path(os.path.commonpath([os.path.abspath(shard.parent) for shard in shards]))
    classes = Classes(class_names(root))
    total = without = 0
    with IndexWriter(out, "tar", stored_root(root, out)) as writer:
        for k, (shard, found) in enumerate(zip(shards, _scan_all(shards, scan, workers))):
            number = writer.add_shard(os.path.relpath(shard, root), found.size, found.mtime_ns)
            labels = [classes.number(label, shard) for label in found.labels]
            writer.extend(b"".join(found.names), found.lengths(), number, found.sizes, labels, found.offsets)
            total += sum(found.sizes)
            without += found.without_image
            if progress is not None:
                progress(k + 1, len(shards))
        if not len(writer):
            raise UserError(
                f"data.path: {root}: expected images in the {len(shards)} shards, found none; check the shards"
            )
        names, relabel = classes.finish()
        writer.finish(names, relabel)
        return {
            "index": str(out),
            "shards": len(shards),
            "samples": len(writer),
            "bytes": total,
            "classes": len(names),
            "without_image": without,
        }


def check_index(path: str | os.PathLike[str], *, workers: int = 1, progress: Progress | None = None) -> list[str]:
    """Compare an index of shards with all their tar headers and labels; what does not agree, one line each.

    Also looked at: the checksum of the index, shards missing from the folder or, for the index.lut of the folder, from the
    index. Samples that the index of a selection leaves out are no difference. UserError when the file is no index of shards.
    """
    index = SampleIndex.open(path)
    if index.kind != "tar":
        raise UserError(f"index {index.path}: expected an index of tar shards, found one of files")
    index.check_content()
    shards = [index.root / index.shard(k).name for k in range(index.shard_count)]
    whole = index.path.name == INDEX_NAME and index.root.is_dir() and index.path.parent.samefile(index.root)
    present = {shard.name for shard in index.root.iterdir() if is_shard(shard.name)} if whole else set()
    problems = [f"{index.root / name}: not in the index" for name in sorted(present - {shard.name for shard in shards})]
    starts = np.searchsorted(index.shard_numbers(), np.arange(index.shard_count + 1))
    scans = _scan_all(shards, functools.partial(_try_scan, scan_shard), workers)
    for k, found in enumerate(scans):
        problems += (
            [found] if isinstance(found, str) else _differences(index, k, found, int(starts[k]), int(starts[k + 1]))
        )
        if progress is not None:
            progress(k + 1, len(shards))
    return problems


def _differences(index: SampleIndex, k: int, found: ShardScan, start: int, stop: int) -> Iterator[str]:
    """What differs between rows [start, stop) of the index and shard `k` as it is."""
    shard = index.shard(k)
    path = index.root / shard.name
    if found.size != shard.size:
        yield f"{path}: {found.size} bytes, {shard.size} in the index"
    rows = {index.place(i)[0]: index.entry(i) for i in range(start, stop)}
    for name, offset, size, label in zip(found.names, found.offsets, found.sizes, found.labels):
        row = rows.pop(offset, None)
        where = f"{path}: byte {offset}: {os.fsdecode(name)}"
        if row is None and index.selection:
            continue
        if row is None or row.name != os.fsdecode(name) or row.size != size:
            yield f"{where}, {size} bytes; in the index: {f'{row.name}, {row.size} bytes' if row else 'nothing there'}"
        elif not _same_label(index, row.label, label):
            yield f"{where}: label {label}; in the index: {row.label}"
    for offset, row in rows.items():
        yield f"{path}: byte {offset}: nothing there; in the index: {row.name}"


def _same_label(index: SampleIndex, stored: int, found: int | str | None) -> bool:
    if isinstance(found, str):
        return stored >= 0 and index.classes[stored] == found
    return stored == (-1 if found is None else found)


def _try_scan(scan: Callable[[Path], ShardScan], shard: Path) -> ShardScan | str:
    try:
        return scan(shard)
    except UserError as error:
        return str(error)


def _scan_all(shards: Sequence[Path], scan: Callable[[Path], Any], workers: int) -> Iterable[Any]:
    """The scans of all shards in their order, by processes where `workers` allows; few are held at a time."""
    if workers == 1 or len(shards) == 1:
        yield from map(scan, shards)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of this process hold
    with ProcessPoolExecutor(min(workers, len(shards)), context, _ignore_interrupts) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for shard in shards:
                waiting.append(pool.submit(scan, shard))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends its workers


def stored_root(root: Path, out: Path) -> str:
    """How an index at `out` names its root: relative where the root is its folder or below, so that both can move."""
    root, folder = Path(os.path.abspath(root)), Path(os.path.abspath(out)).parent
    return os.path.relpath(root, folder) if root.is_relative_to(folder) else os.fspath(root)
