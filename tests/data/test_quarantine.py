"""The list of bad samples across crashes and restarts, and the share that ends a run."""

from pathlib import Path

import pytest

from lut_ds.data.quarantine import BadSample, QuarantineFile, check_share, read_quarantine
from lut_ds.errors import RunFault


def bad(*samples: int) -> list[BadSample]:
    return [BadSample(f"/data/é{i}.jpg", i, 2, 10 * i, "found an empty file") for i in samples]


def test_each_name_once_over_all_starts(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    assert read_quarantine(path) == []
    first = QuarantineFile(path)
    assert first.add([]) == []
    assert not path.exists()
    assert first.add(bad(1, 2, 1)) == bad(1, 2)
    assert first.add(bad(2, 3)) == bad(3)
    assert QuarantineFile(path).add(bad(1, 4)) == bad(4)
    assert read_quarantine(path) == bad(1, 2, 3, 4)


@pytest.mark.parametrize("cut", [1, 2, 30, 70])
def test_a_line_that_a_crash_cut_short(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "quarantine.jsonl"
    QuarantineFile(path).add(bad(1, 2))
    path.write_bytes(path.read_bytes()[:-cut])
    whole = 2 if cut == 1 else 1
    assert read_quarantine(path) == bad(1, 2)[:whole]
    QuarantineFile(path).add(bad(1, 2, 3))
    assert sorted(read_quarantine(path), key=lambda entry: entry.sample) == bad(1, 2, 3)


def test_the_share_is_of_a_thousand_samples_at_least() -> None:
    for count, seen, most in [(10, 10, 0.01), (0, 0, 0.0), (0, 10**6, 0.0), (10**4, 10**6, 0.01), (5, 5, 1.0)]:
        check_share(count, seen, most, bad(1))
    for count, seen, most in [(11, 11, 0.01), (1, 1, 0.0), (10**4 + 1, 10**6, 0.01)]:
        with pytest.raises(
            RunFault, match=rf"data: {count} of {seen} samples .* for example /data/é1.jpg: found an empty"
        ):
            check_share(count, seen, most, bad(1))
