"""A verification finds exactly what is wrong, goes on where it was stopped, and survives a decoder that does not."""

import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lut_ds.data.sources import open_source
from lut_ds.data.validity import image_hw
from lut_ds.data.verify import verify
from lut_ds.errors import RunFault, UserError
from tests.data.images import encode, photo, write_folder
from tests.data.planted import BAD, GOOD, plant


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_name(path: Path, root: Path, key: str) -> list[tuple[str, str]]:
    return sorted((os.path.relpath(line["name"], root), line[key]) for line in lines(path))


def stopped_soon(data: Path, out: Path) -> dict[str, Any]:
    """A verification that is stopped once the first results are in its journal."""
    return verify(str(data), out, workers=1, stopped=lambda: any((out / "journal.records").read_bytes()))


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any], Any]:
    """A folder with faults, the results of its verification, and what had to be found."""
    root = tmp_path_factory.mktemp("planted")
    expected = plant(root / "data")
    return root / "data", root / "out", verify(str(root / "data"), root / "out", workers=2), expected


def test_planted_faults_are_found_and_nothing_else(verified: Any) -> None:
    data, out, summary, (reasons, findings) = verified
    assert by_name(out / "quarantine.jsonl", data, "reason") == sorted(reasons.items())
    assert by_name(out / "findings.jsonl", data, "kind") == sorted(findings)
    assert all(line["detail"] for line in lines(out / "quarantine.jsonl") + lines(out / "findings.jsonl"))
    assert summary["reasons"] == Counter(reasons.values())
    assert summary["findings"] == Counter(kind for _, kind in findings)
    assert summary["usable"] + summary["quarantined"] == summary["samples"]
    assert json.loads((out / "summary.json").read_text()) == summary


def test_the_clean_index_is_the_data_without_the_bad(verified: Any) -> None:
    data, out, summary, (reasons, _) = verified
    for split in ("train", "val"):
        whole, clean = open_source(data, split), open_source(out / "clean", split)
        names = [whole.name(i) for i in range(len(whole)) if os.path.relpath(whole.name(i), data) not in reasons]
        assert [clean.name(i) for i in range(len(clean))] == names
        assert clean.classes == whole.classes
        labels = {whole.name(i): whole.label(i) for i in range(len(whole))}
        assert [clean.label(i) for i in range(len(clean))] == [labels[name] for name in names]
        assert all(image_hw(clean.read(i), clean.name(i)) for i in range(len(clean)))
        assert summary["splits"][split]["usable"] == len(clean)


def test_one_worker_and_many_agree(verified: Any, tmp_path: Path) -> None:
    data, out, summary, _ = verified
    again = verify(str(data), tmp_path / "out", workers=1)
    changing = ("out", "seconds", "splits")
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in summary.items() if k not in changing
    }
    for name in ("quarantine.jsonl", "findings.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


def test_stopped_and_run_again_it_decodes_nothing_twice(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", 80, height=32, width=32)
    broken = tmp_path / "data" / "class0" / "0000.jpg"  # in the first chunk
    broken.write_bytes(GOOD[:600])
    first = stopped_soon(tmp_path / "data", tmp_path / "out")
    assert not first["complete"]
    assert 0 < first["examined"] < 80
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    broken.write_bytes(encode(photo(32, 32)))  # not looked at again: what is known of it stays
    second = verify(str(tmp_path / "data"), tmp_path / "out", workers=1)
    assert second["complete"]
    assert second["resumed_at"] == first["examined"]
    assert [line["name"] for line in lines(tmp_path / "out" / "quarantine.jsonl")] == [str(broken)]
    assert verify(str(tmp_path / "data"), tmp_path / "out", workers=1)["quarantined"] == 0  # a third run starts anew


def test_storage_that_is_away_makes_nothing_bad(tmp_path: Path) -> None:
    """What comes back in time is waited for; else the verification ends, and goes on when it runs again."""
    data, away = write_folder(tmp_path / "data", 80, height=32, width=32), tmp_path / "away"
    (data / "class0" / "0078.jpg").unlink()  # found missing, as it is
    (data / "class0" / "0078.jpg").symlink_to("nowhere")

    def run(out: Path, retry_seconds: float, come_back: bool) -> dict[str, Any]:
        timers: list[threading.Timer] = []

        def unmount() -> bool:
            """Between two chunks, once."""
            if not timers and any((out / "journal.records").read_bytes()):
                data.rename(away)
                timers.append(threading.Timer(0.5, away.rename, [data]))
                if come_back:
                    timers[0].start()
            return False

        found = verify(str(data), out, workers=1, retry_seconds=retry_seconds, stopped=unmount)
        timers[0].join()
        return found

    waited = run(tmp_path / "waited", 600, come_back=True)
    with pytest.raises(
        RunFault, match=r"nor could any other file, for \d+ s: see that the data is mounted, then run again$"
    ):
        run(tmp_path / "out", 0.3, come_back=False)
    away.rename(data)
    again = verify(str(data), tmp_path / "out", workers=1)
    assert again["resumed_at"] > 0
    for found in (waited, again):
        assert (found["usable"], found["reasons"]) == (79, {"missing": 1})


def test_a_changed_folder_is_started_anew(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", 80, height=32, width=32)
    assert stopped_soon(tmp_path / "data", tmp_path / "out")["examined"]
    old = tmp_path / "data" / "class0" / "0000.jpg"
    old.rename(old.with_name("other.jpg"))
    assert verify(str(tmp_path / "data"), tmp_path / "out", workers=1)["resumed_at"] == 0


def test_duplicates_can_be_dropped(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "x.jpg").write_bytes(GOOD)
    kept = verify(str(tmp_path / "data"), tmp_path / "kept", workers=1)
    assert (kept["usable"], kept["findings"]) == (3, {"duplicate": 2})
    dropped = verify(str(tmp_path / "data"), tmp_path / "dropped", workers=1, drop_duplicates=True)
    assert (dropped["usable"], dropped["reasons"], dropped["findings"]) == (1, {"duplicate": 2}, {})
    clean = open_source(tmp_path / "dropped" / "clean", "train")
    assert [clean.name(i) for i in range(len(clean))] == [str(tmp_path / "data/a/x.jpg")]


def test_the_smallest_side_is_a_limit(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", 3, height=32, width=40)
    found = verify(str(tmp_path / "data"), tmp_path / "out", workers=1, min_side=33)
    assert found["reasons"] == {"too small": 1}


def test_results_of_something_else_are_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"found thesis\.tex; give another --out"):
        verify(str(tmp_path / "data"), tmp_path / "out", workers=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_details_speak(verified: Any) -> None:
    data, out, _, _ = verified
    said = {
        os.path.relpath(line["name"], data / "train" / "a"): line["detail"] for line in lines(out / "quarantine.jsonl")
    }
    assert "65500x65500" in said["bomb.jpg"]
    assert said["movie.jpg"].startswith("GIF; expected one of JPEG")
    assert said["page.jpg"] == "looks like HTML"
    assert "truncated" in said["half.jpg"]
    assert f"a link to {data}/nowhere.jpg" in said["gone.jpg"]
    assert set(BAD) <= set(said)
    assert np.all([("\n" not in text) for text in said.values()])
