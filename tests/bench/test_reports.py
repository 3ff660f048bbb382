"""The committed measurements: each is in the table, and says with what, when and on what it was made."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
REPORTS = sorted([*FOLDER.glob("*.json"), *FOLDER.glob("evidence/*.json")])
PLACES = re.compile(r'"[^"]*(?<![\w.])/(work|tmp|home|root|opt|mnt|data)/[^"]*"')


def keys(tree: Any) -> set[str]:
    """All keys at any depth."""
    if isinstance(tree, dict):
        return set(tree) | {key for value in tree.values() for key in keys(value)}
    return {key for value in tree for key in keys(value)} if isinstance(tree, list) else set()


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.stem)
def test_a_report_says_where_it_is_from(file: Path) -> None:
    text = file.read_text()
    found = keys(json.loads(text))
    for wanted in ({"command"}, {"date", "started"}, {"cpu", "hardware", "machine"}, {"versions", "torch"}):
        assert found & wanted, f"{file.name} has none of {', '.join(sorted(wanted))}"
    assert not PLACES.search(text)


def test_the_table_names_every_report() -> None:
    table = (FOLDER / "README.md").read_text()
    rows = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert {f"{file.parent.name}/" if file.parent != FOLDER else file.name for file in REPORTS} <= rows
    for name in rows:
        assert (FOLDER / name).exists(), name
