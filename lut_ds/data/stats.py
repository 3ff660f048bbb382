"""`lut-ds data stats`: how many samples a class has, how large they are, in which formats, and what they will cost."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.order import SampleOrder
from lut_ds.data.parts import Part, open_parts, opener
from lut_ds.data.progress import progress_bar
from lut_ds.data.sources import Source
from lut_ds.data.workers import Crash, Crew, Work

MEASURE = np.dtype(
    [
        ("width", "<u4"),  # 0: not readable
        ("height", "<u4"),
        ("bytes", "<u4"),
        ("format", "S4"),  # as Pillow calls it
        ("mode", "S6"),  # as Pillow calls it
        ("sampling", "S5"),  # chroma subsampling of a JPEG
        ("seconds", "<f4"),  # of CPU to decode it; 0: not measured
    ]
)
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
SURVEY = "lut_ds.data.survey"  # imports torch and DALI, which this process has no use for
_CHUNK = 64
_DECODED = 200  # samples, about, whose decoding is timed
_SHARD, _IN_TAR = 1_000_000_000, 2048  # bytes of a shard; what a sample takes in it besides the image, about


def survey(
    path: str, sample: int | None = None, workers: int = 1
) -> tuple[dict[str, Any], dict[str, tuple[NDArray[np.void], NDArray[np.int64]]]]:
    """Measure the samples of `path`, from their headers: all, or `sample` of each split drawn at random.

    Returns:
        the statistics, and for each split the MEASURE records and the int64 samples [classes] of each class.
    """
    statistics: dict[str, Any] = {"path": path, "splits": {}}
    raw: dict[str, tuple[NDArray[np.void], NDArray[np.int64]]] = {}
    for part in open_parts(path):
        counts = class_counts(part.source)
        measured = _measure(path, part, sample, workers)
        raw[part.split] = (measured, counts)
        statistics["splits"][part.split] = summarise(measured, len(part.source), counts)
    return statistics, raw


def class_counts(source: Source) -> NDArray[np.int64]:
    """Samples of each class, int64 [classes]."""
    labels = np.fromiter(map(source.label, range(len(source))), np.int64, len(source))
    return np.bincount(labels[labels >= 0], minlength=len(source.classes))


def open_surveyor(open_shared: Callable[[], Source], timed: int) -> "Work[NDArray[np.void]]":
    """A Surveyor in a worker process."""
    from lut_ds.data.survey import Surveyor

    return Surveyor(open_shared(), timed)


def _measure(path: str, part: Part, sample: int | None, workers: int) -> NDArray[np.void]:
    n = len(part.source)
    chosen = np.arange(n)
    if sample is not None and sample < n:
        chosen = np.sort(SampleOrder(n, 0).samples(0, np.arange(sample)))
    found = []
    with tempfile.TemporaryDirectory(prefix="lut-ds-") as folder, progress_bar(part.split, len(chosen)) as bar:
        shared = opener(path, part, Path(folder) / "listing.lut")
        surveyor = partial(open_surveyor, shared, max(1, len(chosen) // _DECODED))
        crew = Crew[NDArray[np.void]](surveyor, workers, preload=[SURVEY])
        for samples, answer in crew.run(chosen[i : i + _CHUNK] for i in range(0, len(chosen), _CHUNK)):
            found.append(np.zeros(1, MEASURE) if isinstance(answer, Crash) else answer)
            bar.update(len(samples))
    return np.concatenate(found)


def summarise(measured: NDArray[np.void], samples: int, counts: NDArray[np.int64]) -> dict[str, Any]:
    """Statistics of a split from the MEASURE records of some or all of its `samples`; `counts` are those of the classes."""
    good = measured[measured["width"] > 0]
    scale = samples / len(measured)
    total = float(measured["bytes"].sum(dtype=np.float64) * scale)
    seconds = good["seconds"][good["seconds"] > 0].astype(np.float64)
    shorter = np.minimum(good["width"], good["height"])
    return {
        "samples": samples,
        "measured": len(measured),
        "unreadable": len(measured) - len(good),
        "bytes": round(total),
        "classes": _class_summary(counts),
        "width": percentiles(good["width"]),
        "height": percentiles(good["height"]),
        "shorter_side": percentiles(shorter),
        "aspect": percentiles(good["width"] / np.maximum(good["height"], 1)),
        "file_bytes": percentiles(good["bytes"]),
        **{f"{key}s": _shares(good[key]) for key in ("format", "mode", "sampling")},
        "shards_of_1_gb": -(-round(total + samples * _IN_TAR) // _SHARD),
        "decode": {
            "images": len(seconds),
            "ms_per_image": round(1e3 * float(seconds.mean()), 4) if len(seconds) else None,
            "core_hours_per_epoch": float(seconds.mean()) * samples / 3600 if len(seconds) else None,
        },
    }


def percentiles(values: NDArray[Any]) -> dict[str, float]:
    """Percentiles of `values` [m] by name (`p50`), empty without values."""
    if not len(values):
        return {}
    return {f"p{q}": round(float(value), 4) for q, value in zip(PERCENTILES, np.percentile(values, PERCENTILES))}


def _class_summary(counts: NDArray[np.int64]) -> dict[str, float]:
    if not len(counts):
        return {"count": 0}
    return {
        "count": len(counts),
        "empty": int((counts == 0).sum()),
        "min": int(counts.min()),
        "median": float(np.median(counts)),
        "max": int(counts.max()),
    }


def _shares(values: NDArray[np.bytes_]) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    names, counts = np.unique(values[values != b""], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {names[k].decode(): int(counts[k]) for k in order}


def describe(statistics: dict[str, Any]) -> str:
    """The statistics for people."""
    lines = []
    for split, found in statistics["splits"].items():
        classes, decode = found["classes"], found["decode"]
        part = "" if found["measured"] == found["samples"] else f" (from {found['measured']:,} of them)"
        lines.append(f"{split}: {found['samples']:,} samples, {found['bytes'] / 1e9:.3f} GB{part}")
        if found["unreadable"]:
            lines.append(f"  not readable   {found['unreadable']:,}: see lut-ds data verify")
        if classes["count"]:
            lines.append(
                f"  classes        {classes['count']:,}, samples each: {classes['min']:,} to {classes['max']:,}, "
                f"median {classes['median']:g}"
            )
        for key in ("width", "height", "shorter_side", "aspect", "file_bytes"):
            if found[key]:
                shown = "  ".join(f"{name} {found[key][name]:,g}" for name in ("p0", "p5", "p50", "p95", "p100"))
                lines.append(f"  {key.replace('_', ' '):14} {shown}")
        for key in ("formats", "modes", "samplings"):
            lines.append(f"  {key:14} " + ", ".join(f"{name} {count:,}" for name, count in found[key].items()))
        lines.append(f"  shards of 1 GB {found['shards_of_1_gb']:,}")
        if decode["images"]:
            lines.append(
                f"  decoding       {decode['ms_per_image']:.3g} ms of a core an image (of {decode['images']} tried), "
                f"{decode['core_hours_per_epoch']:.3g} core hours an epoch"
            )
    return "\n".join(lines)
