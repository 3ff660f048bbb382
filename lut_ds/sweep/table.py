"""One table of a sweep: a row for each name and weights, mean and deviation over seeds; Markdown, CSV and JSON."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
WEIGHTS = {"student": "student", "ema": "teacher"}

_COLUMNS: dict[str, tuple[str, Callable[[Record, Record], float | None]]] = {
    "knn": ("k-NN top-1, %", lambda training, found: found.get("knn", {}).get("10")),
    "probe": ("probe top-1, %", lambda training, found: found.get("probe")),
    "attention_distance": (
        "attention distance, pixels",
        lambda training, found: found.get("attention_distance", {}).get("mean"),
    ),
    "effective_rank": ("effective rank", lambda training, found: found.get("spectrum", {}).get("effective_rank")),
    "feature_spread": (
        "feature spread in training",
        lambda training, found: training["last_epoch"].get("feature_spread"),
    ),
    "mae": (
        "reconstruction loss",
        lambda training, found: training["last_epoch"].get(
            "mae", training["last_epoch"].get("loss")
        ),  # MAE has no other
    ),
    "bc": ("bc loss", lambda training, found: training["last_epoch"].get("bc")),
    "tflop": ("TFLOP", lambda training, found: training["tflop"]),
    "seconds": ("seconds", lambda training, found: training["seconds"]),
}
TITLES = {key: title for key, (title, _) in _COLUMNS.items()}
_OF_THE_RUN = ("feature_spread", "mae", "bc", "tflop", "seconds")  # the same for student and teacher: said once


@dataclass(frozen=True)
class Row:
    """One name and weights: values by column for each seed; what was not measured is not there."""

    name: str
    weights: str
    seeds: tuple[int, ...]
    epochs: float
    values: dict[str, list[float]]

    def mean(self, column: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.values[column])

    def deviation(self, column: str) -> float | None:
        """Sample standard deviation over seeds, None of one."""
        values = self.values[column]
        return statistics.stdev(values) if len(values) > 1 else None


def table_rows(records: Sequence[Record]) -> list[Row]:
    """The records of finished runs, in order of their names' first appearance, student before teacher."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        for kind in record["found"]:
            grouped.setdefault((record["name"], kind), []).append(record)
    order = list(dict.fromkeys(record["name"] for record in records))
    rows = []
    for name, kind in sorted(grouped, key=lambda key: (order.index(key[0]), key[1] == "ema")):
        same = grouped[name, kind]
        values: dict[str, list[float]] = {}
        for column, (_, read) in _COLUMNS.items():
            found = [read(record["training"], record["found"][kind]) for record in same]
            if all(v is not None for v in found) and (kind == "student" or column not in _OF_THE_RUN):
                values[column] = [float(v) for v in found if v is not None]
        epochs = statistics.fmean(record["training"]["epochs"] for record in same)
        rows.append(Row(name, WEIGHTS[kind], tuple(record["seed"] for record in same), epochs, values))
    return rows


def used_columns(rows: Sequence[Row]) -> list[str]:
    """Columns in which a row has a value, in order."""
    return [column for column in _COLUMNS if any(column in row.values for row in rows)]


def as_markdown(rows: Sequence[Row], pixels: Record | None) -> str:
    """The table for people: mean ± sample standard deviation over seeds."""
    columns = used_columns(rows) or ["knn", "probe"]
    lines = [
        f"| run | weights | seeds | epochs | {' | '.join(TITLES[c] for c in columns)} |",
        "| --- | --- | ---: | ---: |" + " ---: |" * len(columns),
    ]
    if pixels is not None:
        raw = {"knn": pixels["found"]["knn"]["10"], "probe": pixels["found"]["probe"]}
        cells = [f"{raw[c]:.1f}" if c in raw else "" for c in columns]
        lines.append(f"| raw pixels | | | | {' | '.join(cells)} |")
    for row in rows:
        cells = [_cell(row, column) for column in columns]
        lines.append(f"| {row.name} | {row.weights} | {len(row.seeds)} | {row.epochs:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row, column: str) -> str:
    if column not in row.values:
        return ""
    mean, deviation = row.mean(column), row.deviation(column)
    digits = 1 if abs(mean) >= 10 else 2 if abs(mean) >= 1 else 3
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def as_csv(rows: Sequence[Row]) -> str:
    """The same with a column each for mean and deviation; nothing where there is no value."""
    columns = used_columns(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "weights", "seeds", "epochs", *(f"{c}_{what}" for c in columns for what in ("mean", "sd"))])
    for row in rows:
        cells: list[Any] = [row.name, row.weights, len(row.seeds), row.epochs]
        for column in columns:
            there = column in row.values
            cells += [row.mean(column), row.deviation(column)] if there else ["", ""]
        writer.writerow(cells)
    return text.getvalue()


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same, with the values of every seed."""
    return [
        {
            "run": row.name,
            "weights": row.weights,
            "seeds": list(row.seeds),
            "epochs": row.epochs,
            **{c: {"mean": row.mean(c), "sd": row.deviation(c), "values": row.values[c]} for c in row.values},
        }
        for row in rows
    ]
