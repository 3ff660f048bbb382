"""Which data a run reads after rewinds: never the passed-over ones, and always the same ones after a kill."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lut_ds.engine.guards.spans import SkippedSpans, Span
from lut_ds.errors import RunFault


def ranges(spans: SkippedSpans, start: int, stop: int) -> list[int]:
    return [step for first, last in spans.data_ranges(start, stop) for step in range(first, last)]


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), max_size=6))
def test_rewinds_as_a_run_makes_them(trips: list[tuple[int, int]]) -> None:
    """Against a run that keeps a list of the data steps it read: `forward` steps, then a spike, `back` steps back."""
    spans, read = SkippedSpans(), []
    following = 0
    for forward, back in trips:
        for _ in range(forward):
            read.append(following)
            following += 1
        assert [spans.data_step(step) for step in range(len(read))] == read
        spike = len(read)  # the last step was the spike
        back_to = max(0, spike - back)
        spans = spans.rewound(back_to, spike)
        del read[back_to:]
        assert ranges(spans, 0, back_to) == read
        assert spans.data_step(back_to) == following
    assert spans.rewinds == len(trips)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=5),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_ranges_are_the_steps_one_by_one(entries: list[tuple[int, int]], start: int, steps: int) -> None:
    spans = SkippedSpans(tuple(Span(*entry) for entry in sorted(entries)))
    expected = [spans.data_step(step) for step in range(start, start + steps)]
    assert ranges(spans, start, start + steps) == expected
    assert expected == sorted(set(expected))


def test_the_file_of_a_run(tmp_path: Path) -> None:
    assert SkippedSpans.read(tmp_path) is None
    spans = SkippedSpans().rewound(10, 14).rewound(10, 13).rewound(20, 21)
    assert spans.spans == (Span(10, 4), Span(10, 3), Span(20, 1))
    spans.write(tmp_path)
    assert SkippedSpans.read(tmp_path) == spans == SkippedSpans.from_dict(spans.as_dict())
    (tmp_path / "skipped.json").write_text('{"spans": [{"at"')
    with pytest.raises(RunFault, match=r"skipped\.json: not readable .*; restore it"):
        SkippedSpans.read(tmp_path)
