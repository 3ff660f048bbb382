"""`lut-ds data pack`: any source as WebDataset-style tar shards, shuffled once, so that reading on is reading at random.

The shards are a function of the samples and the options: not of the number of workers, nor of interruptions.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lut_ds.data.classes import check_class_names, write_class_names
from lut_ds.data.folder import split_root
from lut_ds.data.order import SampleOrder
from lut_ds.data.outputs import hold, writable_folder, write_lines
from lut_ds.data.parts import Part, fingerprint, opener, refuse_inside
from lut_ds.data.progress import progress_bar
from lut_ds.data.shard_index import write_index
from lut_ds.data.sources import Source, open_source
from lut_ds.data.workers import Chunk, Crash, Crew, Work
from lut_ds.errors import RunFault, UserError

PLAN, SKIPPED, LISTING = "pack.json", "skipped.jsonl", ".listing.lut"
PACKING = "lut_ds.data.packing"  # imports torch and DALI, which this process has no use for
_PILOTS = 128  # samples that are packed on trial to learn how many fill a shard
_SPARE = 1.05  # of the free space


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards.

    Attributes:
        seed: of the shuffle.
        shard_size: bytes of a shard, about: the number of samples in each is the same.
        samples_per_shard: samples of a shard; given, `shard_size` does not count.
        shorter_side: pixels; images whose shorter side is longer are made smaller (Lanczos) and stored as JPEG.
        quality: of the JPEGs that are written, 1-100. Without `shorter_side` every image is encoded again.
    """

    seed: int = 0
    shard_size: int = 1_000_000_000
    samples_per_shard: int | None = None
    shorter_side: int | None = None
    quality: int | None = None


def pack(
    path: str,
    out: Path,
    options: Options,
    *,
    split: Literal["train", "val"] = "train",
    workers: int = 1,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Write the samples of `path` into shards in `out`, then their index; run again, it writes the shards that are missing.

    Images that cannot be read or decoded (the latter only where they are made smaller) are left out and listed in
    skipped.jsonl.

    Returns:
        out, samples (packed), skipped, shards, samples_per_shard, bytes (of the shards), complete (False when stopped).

    Raises:
        UserError: `out` lies among the images, cannot be written, holds something else or shards of other options or
            samples, or another process packs there.
        RunFault: too little space, or a worker that dies.
    """
    folder = split_root(Path(path), split) if os.path.isdir(path) else None
    part = Part(split, None, open_source(path, split), 0)
    refuse_inside(out, folder, part.source)
    check_class_names(part.source.classes)
    plan = _plan(path, part, out, options)
    with (out / PLAN).open("r+b") as file:
        if not hold(file.fileno()):
            raise UserError(f"{out}: expected no other pack there, found one that runs; wait for it, or give another")
        return _write(path, part, out, options, plan, workers, stopped)


def _write(
    path: str,
    part: Part,
    out: Path,
    options: Options,
    plan: dict[str, Any],
    workers: int,
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    """Write the shards that are missing, and once all are there what belongs to them; see pack."""
    per_shard, samples = plan["samples_per_shard"], len(part.source)
    shards = -(-samples // per_shard)
    todo = [k for k in range(shards) if not (out / shard_name(k)).exists()]
    _check_space(out, plan["sample_bytes"] * min(samples, len(todo) * per_shard))
    packer = partial(open_packer, opener(path, part, out / LISTING), out, options, per_shard)
    with progress_bar("pack", samples, (shards - len(todo)) * per_shard) as bar:
        crew = Crew[int](packer, workers, preload=[PACKING], patience=3600.0)
        for chunk, answer in crew.run((np.array([k]) for k in todo), stopped):
            if isinstance(answer, Crash):
                raise RunFault(
                    f"{out / shard_name(int(chunk[0]))}: the process that wrote it ended: {answer.why}; "
                    "`lut-ds data verify` names the file, and its clean index leaves it out"
                )
            bar.update(answer)
    for listing in (out / LISTING, *out.glob(f".{LISTING}.*")):  # the latter of a process that was killed
        listing.unlink(missing_ok=True)
    result = {"out": str(out), "shards": shards, "samples_per_shard": per_shard}
    missing = sum(not (out / shard_name(k)).exists() for k in range(shards))
    if missing:
        return {**result, "complete": False, "shards_missing": missing}
    return {**result, **_finish(out, shards, part.source, workers), "complete": True}


def shard_name(k: int) -> str:
    """The file name of shard `k`."""
    return f"shard-{k:06d}.tar"


def skipped_path(shard: Path) -> Path:
    """Where a shard's samples are listed that were left out of it."""
    return shard.with_name(f".{shard.name}.skipped")


def open_packer(open_shared: Callable[[], Source], out: Path, options: Options, per_shard: int) -> Work[int]:
    """A function that writes the shards whose numbers it is given, in a worker process; it returns their samples."""
    from lut_ds.data.packing import Encoder, write_shard

    source = open_shared()
    encoder = Encoder(options.shorter_side, options.quality)
    order = SampleOrder(len(source), options.seed)

    def work(shards: Chunk) -> int:
        done = 0
        for k in shards.tolist():
            positions = np.arange(k * per_shard, min((k + 1) * per_shard, len(source)))
            write_shard(out / shard_name(k), source, order.samples(0, positions), positions, encoder)
            done += len(positions)
        return done

    return work


def open_pilot(open_shared: Callable[[], Source], options: Options) -> Work[int]:
    """A function that returns the bytes that samples take in a shard, in a worker process."""
    from lut_ds.data.packing import Encoder, packed_bytes

    source = open_shared()
    return partial(packed_bytes, source, Encoder(options.shorter_side, options.quality))


def _plan(path: str, part: Part, out: Path, options: Options) -> dict[str, Any]:
    """Read the plan in `out`, or make one there: what is packed and how, and the samples a shard."""
    asked = {"source": fingerprint(part.source), "samples": len(part.source), **asdict(options)}
    if (out / PLAN).exists():
        plan: dict[str, Any] = json.loads((out / PLAN).read_text())
        other = [key for key, value in asked.items() if plan["asked"].get(key) != value]
        if other:
            there = plan["asked"].get(other[0])
            raise UserError(
                f"{out}: expected shards of the same samples and options, found others: {other[0]} is {there} there and "
                f"{asked[other[0]]} here; give another folder"
            )
        return plan
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out}: expected an empty folder, one of an earlier pack, or none, found another; give a new one"
        )
    with tempfile.TemporaryDirectory(prefix="lut-ds-") as folder:
        sample_bytes = _pilot(opener(path, part, Path(folder) / LISTING), len(part.source), options)
    _check_space(out, sample_bytes * len(part.source))
    writable_folder(out)
    per_shard = options.samples_per_shard or max(1, round(options.shard_size / sample_bytes))
    plan = {"asked": asked, "path": path, "samples_per_shard": per_shard, "sample_bytes": round(sample_bytes)}
    write_lines(out / PLAN, [plan], indent=1)
    return plan


def _pilot(shared: Callable[[], Source], samples: int, options: Options) -> float:
    """The mean bytes of a sample in a shard, of the first of the order."""
    first = SampleOrder(samples, options.seed).samples(0, np.arange(min(samples, _PILOTS)))
    crew = Crew[int](partial(open_pilot, shared, options), 1, preload=[PACKING])
    total = sum(0 if isinstance(answer, Crash) else answer for _, answer in crew.run([first]))
    return max(1.0, total / len(first))


def _check_space(out: Path, needed: float) -> None:
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < _SPARE * needed:
        raise UserError(
            f"{out}: expected {_SPARE * needed / 1e9:.3f} GB of free space for the shards, found {free / 1e9:.3f} GB; free "
            "some, give another folder, or use --shorter-side"
        )


def _finish(out: Path, shards: int, source: Source, workers: int) -> dict[str, Any]:
    """Write classes, the list of what was left out, and the index; what there is to say of them."""
    if source.classes:
        write_class_names(out, source.classes)
    lists = [skipped_path(out / shard_name(k)) for k in range(shards)]
    skipped = [json.loads(line) for path in lists if path.exists() for line in path.read_text().splitlines()]
    write_lines(out / SKIPPED, skipped)
    index = write_index(out, workers=workers)
    total = sum((out / shard_name(k)).stat().st_size for k in range(shards))
    return {"samples": index["samples"], "skipped": len(skipped), "bytes": total, "index": index["index"]}


def describe(result: dict[str, Any]) -> str:
    """The result for people."""
    if not result["complete"]:
        missing = result["shards_missing"]
        return f"stopped with {missing} of {result['shards']} shards missing; run it again to go on"
    left_out = f"; {result['skipped']:,} left out, see {result['out']}/{SKIPPED}" if result["skipped"] else ""
    return (
        f"{result['samples']:,} samples in {result['shards']:,} shards, {result['bytes'] / 1e9:.3f} GB{left_out}\n"
        f"data.path={result['out']}"
    )
