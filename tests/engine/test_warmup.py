"""Checks of an allocation before its first step: what is refused, what is warned of, and what it costs."""

import json
import platform
import sys
from pathlib import Path

import pytest

from lut_ds.engine import warmup
from lut_ds.engine.codedigest import own_digests
from lut_ds.errors import UserError
from tests.engine.launching import PATIENCE, run_ranks


def ranks(*wrong: str) -> list[str]:
    """What each of two ranks prints."""
    outputs = run_ranks([sys.executable, "-m", "tests.engine.warmup_worker", *wrong], 2, DS_ACCELERATOR="cpu")
    return [out.strip() for out, _ in outputs]


def test_two_equal_ranks_report_their_links_soon() -> None:
    first, second = (json.loads(text) for text in ranks())
    measured = ("seconds", "all_reduce")  # each rank's own clock; only rank 0's are kept
    assert {k: v for k, v in first.items() if k not in measured} == {
        k: v for k, v in second.items() if k not in measured
    }
    assert first["hosts"] == [platform.node()]
    assert (first["ranks"], first["images"], first["warnings"]) == (2, 10, [])
    assert first["all_reduce"]["bus_gb_per_s"] > 0
    assert [(link["from"], link["to"], link["kind"]) for link in first["links"]] == [(1, 0, "within"), (0, 1, "within")]
    # Milliseconds and less than a second on an idle machine; tests share theirs.
    assert first["clock_skew_s"] < 10
    assert 0 < first["seconds"] < PATIENCE


@pytest.mark.parametrize(
    "wrong, why",
    [
        ("version", "cluster: version "),
        ("recipe", "cluster: recipe optim.blr differs: 0.00015 on rank 0"),
        ("file", "cluster: file own.py:Own differs: "),
        ("images", "data.path: rank 0 ({host}) finds 10 images and rank 1 ({host}) 9"),
        ("unreadable", "data.path: rank 1 ({host}) cannot read: no such file: 0008.jpg"),
    ],
)
def test_a_rank_that_would_train_something_else_is_named_on_every_rank(wrong: str, why: str) -> None:
    first, second = ranks(wrong)
    assert first == second
    assert first.startswith("refused: " + why.format(host=platform.node()))


def fact(rank: int, host: str, **changed: object) -> warmup.Facts:
    same = {"version": {"torch": "2.11"}, "lut_ds": {"commit": "a", "code": "c"}, "recipe": {}}
    usual = {"device": "H100", "same": same, "images": 5, "problem": None, "shared_memory": 64 * warmup.GIB}
    return {"rank": rank, "host": host, **usual, **changed}


def test_other_code_at_the_same_commit_is_refused() -> None:
    other = fact(3, "n2", same={"version": {"torch": "2.11"}, "lut_ds": {"commit": "a", "code": "d"}, "recipe": {}})
    with pytest.raises(UserError, match=r"lut_ds code differs: c on rank 0 \(n1\), d on rank 3 \(n2\)"):
        warmup.refuse_differences([fact(0, "n1"), fact(1, "n1"), other])


def test_a_package_that_one_rank_lacks_is_refused() -> None:
    other = fact(1, "n2", same={"version": {}, "lut_ds": {"commit": "a", "code": "c"}, "recipe": {}})
    for pair in ([fact(0, "n1"), other], [{**other, "rank": 0}, fact(1, "n1")]):
        with pytest.raises(UserError, match="version torch differs"):
            warmup.refuse_differences(pair)


def test_a_source_of_ones_own_is_compared_and_one_that_is_missing_is_told(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    values = {"data": {"path": f"{own}:Zip?images.zip"}, "method": {"degradation": "distorted"}}
    (missing,) = own_digests(values).items()
    assert missing == (values["data"]["path"], "No such file or directory")
    own.write_text("# 1")
    (found,) = own_digests(values).values()
    own.write_text("# 2")
    assert len(found) == 12
    assert own_digests(values) != {values["data"]["path"]: found}
    assert own_digests({"data": {"path": str(tmp_path)}, "method": {"degradation": "none"}}) == own_digests({}) == {}


def test_what_is_slow_or_fragile_is_a_warning_that_names_the_host() -> None:
    facts = [fact(0, "n1"), fact(1, "n2", device="A100"), fact(2, "n3", shared_memory=10 << 20)]
    assert warmup.device_warnings(facts) == ["rank 1 (n2) has a A100, rank 0 a H100: the slower sets the pace"]
    assert warmup.clock_warnings(facts, [0.0, -2.5, 0.4]) == ["the clock of n2 is -2.5 s off: set it by NTP"]
    (memory,) = warmup.memory_warnings(facts)
    assert memory.startswith("n3 has 0.01 GiB of /dev/shm free")
    assert warmup.memory_warnings([fact(0, "n1", device="cpu", shared_memory=0)]) == []


def test_a_slow_link_is_found_among_its_kind_only() -> None:
    facts = [fact(rank, f"n{rank // 2}") for rank in range(8)]
    links = [
        {
            "from": (to - 1) % 8,
            "to": to,
            "kind": "within" if to % 2 else "between",
            "gb_per_s": 200.0 if to % 2 else 40.0,
        }
        for to in range(8)
    ]
    assert warmup.link_warnings(facts, links) == []
    links[4]["gb_per_s"] = 10.0
    (warning,) = warmup.link_warnings(facts, links)
    assert warning.startswith("slow link: rank 3 (n1) to rank 4 (n2) moves 10 GB/s, the median between nodes is 40")
