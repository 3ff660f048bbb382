"""Results for people (Markdown) and for spreadsheets (CSV)."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from lut_ds.transfer.robustness.corruptions import EXTRA

TITLES = {
    "clean": "validation images",
    "a": "ImageNet-A",
    "r": "ImageNet-R",
    "sketch": "ImageNet-Sketch",
    "v2": "ImageNet-V2",
    "objectnet": "ObjectNet",
}


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of sets, corruptions, hidden and shuffled patches, and what the numbers are."""
    parts = [f"# Robustness of {results['model']['source']}\n\n{_about(results)}"]
    sets = [(TITLES[n], _per_cent(r["top1"]), _per_cent(r["top5"]), r["images"]) for n, r in results["sets"].items()]
    if sets:
        parts.append(_table(("images", "top-1, %", "top-5, %", "count"), sets))
    if "objectnet" in results["sets"]:
        parts.append("ObjectNet: the classes that it shares with ImageNet compete alone; its own script lets all 1000.")
    if "corruptions" in results:
        parts += ["## Corruptions, top-1 in per cent\n\n" + _corruptions(results["corruptions"])]
    if "occlusion" in results:
        rows = [(how, *map(_per_cent, tops.values())) for how, tops in results["occlusion"].items()]
        ratios = next(iter(results["occlusion"].values()))
        parts.append("## Hidden patches, top-1 in per cent\n\n" + _table(("share hidden", *ratios), rows))
    if "shuffle" in results:
        tops = results["shuffle"]
        parts.append(
            "## Shuffled cells, top-1 in per cent\n\n"
            + _table(("cells", *(f"{g} x {g}" for g in tops)), [("top-1", *map(_per_cent, tops.values()))])
        )
    return "\n\n".join(parts) + "\n"


def summary(results: Mapping[str, Any]) -> str:
    """A few lines for the screen."""
    lines = [f"{TITLES[name]:18} top-1 {row['top1']:.2f} %" for name, row in results["sets"].items()]
    if "corruptions" in results:
        lines.append(f"{'corrupted':18} {_means(results['corruptions'])}")
    for how, tops in results.get("occlusion", {}).items():
        told = ", ".join(f"{float(ratio):.0%}: {top1:.2f} %" for ratio, top1 in tops.items())
        lines.append(f"{'hidden, ' + how:18} {told}")
    if "shuffle" in results:
        told = ", ".join(f"{grid} x {grid}: {top1:.2f} %" for grid, top1 in results["shuffle"].items())
        lines.append(f"{'shuffled':18} {told}")
    return "\n".join(lines)


def csv_table(results: Mapping[str, Any]) -> str:
    """A row a number: what, which, value, top1."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("what", "which", "value", "top1"))
    writer.writerows(("set", name, "", row["top1"]) for name, row in results["sets"].items())
    for what, table in (
        ("corruption", results.get("corruptions", {}).get("top1", {})),
        ("occlusion", results.get("occlusion", {})),
        ("shuffle", {"cells": results["shuffle"]} if "shuffle" in results else {}),
    ):
        writer.writerows((what, which, value, top1) for which, row in table.items() for value, top1 in row.items())
    return file.getvalue()


def _about(results: Mapping[str, Any]) -> str:
    limit = f", {results['limit']} images of each set" if results["limit"] else ""
    return f"Classifier: {results['classifier']['head']}; {results['model']['image_size']} pixels{limit}."


def _corruptions(found: Mapping[str, Any]) -> str:
    severities = sorted({s for row in found["top1"].values() for s in row})
    ce = found.get("ce", {})
    rows = []
    for name, row in found["top1"].items():
        title = name.replace("_", " ") + (" (extra)" if name in EXTRA else "")
        cells = [_per_cent(row.get(s)) for s in severities]
        rows.append((title, *cells, _per_cent(found["error"][name]), *([_per_cent(ce.get(name))] if ce else [])))
    header = ("corruption", *(f"severity {s}" for s in severities), "mean error", *(["CE"] if ce else []))
    made = "Computed here: not the pixels of the published set." if found["images"] == "computed" else "As downloaded."
    return f"{_table(header, rows)}\n\n{_means(found)}. {made}"


def _means(found: Mapping[str, Any]) -> str:
    mean = "no mean error" if found["mean_error"] is None else f"mean error {found['mean_error']:.2f} %"
    if found["mce"] is None:
        return f"{mean} (no mCE: {found['no_mce']})"
    relative = "" if found["relative_mce"] is None else f", relative mCE {found['relative_mce']:.2f} %"
    return f"{mean}, mCE {found['mce']:.2f} %{relative}"


def _per_cent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(header: tuple[Any, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
