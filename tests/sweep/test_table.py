"""The table of a sweep: means and deviations over seeds, student before teacher, nothing where nothing was measured."""

import csv
import io
from typing import Any

import pytest

from lut_ds.sweep.table import as_csv, as_json, as_markdown, table_rows


def record(name: str, seed: int, knn: dict[str, float], **last: float) -> dict[str, Any]:
    training = {"epochs": 12.0, "tflop": 2.5, "seconds": 31.0 + seed, "last_epoch": last}
    return {"name": name, "seed": seed, "training": training, "found": {k: {"knn": {"10": v}} for k, v in knn.items()}}


RECORDS = [
    record("b", 0, {"student": 10.0, "ema": 20.0}, mae=0.5, bc=0.25),
    record("a", 0, {"student": 7.0}, loss=0.75),
    record("b", 1, {"student": 13.0, "ema": 26.0}, mae=0.25, bc=0.25),
]


def test_rows() -> None:
    rows = table_rows(RECORDS)
    assert [(row.name, row.weights, row.seeds) for row in rows] == [
        ("b", "student", (0, 1)),
        ("b", "teacher", (0, 1)),
        ("a", "student", (0,)),
    ]
    student, teacher, mae = rows
    assert student.values["knn"] == [10.0, 13.0]
    assert student.mean("knn") == 11.5
    assert student.deviation("knn") == pytest.approx(4.5**0.5)  # n - 1
    assert mae.deviation("knn") is None
    assert mae.values["mae"] == [0.75]  # MAE's only loss is its reconstruction
    assert "bc" not in mae.values
    assert "seconds" not in teacher.values  # said once, of the run


def test_the_same_in_three_forms() -> None:
    rows = table_rows(RECORDS)
    lines = as_markdown(rows, {"found": {"knn": {"10": 45.04, "20": 1.0}, "probe": 14.0}}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert cells[0][4] == "k-NN top-1, %"
    assert cells[2][:5] == ["raw pixels", "", "", "", "45.0"]
    assert cells[3][:5] == ["b", "student", "2", "12", "11.5 ± 2.1"]
    assert cells[5][:5] == ["a", "student", "1", "12", "7.00"]
    table = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert (table[0]["knn_mean"], float(table[0]["knn_sd"])) == ("11.5", pytest.approx(4.5**0.5))
    assert (table[1]["seconds_mean"], table[2]["knn_sd"]) == ("", "")
    assert as_json(rows)[0]["knn"] == {"mean": 11.5, "sd": pytest.approx(4.5**0.5), "values": [10.0, 13.0]}
