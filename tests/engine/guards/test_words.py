"""What the guards say: who is missing, who differs, which steps were bad."""

from typing import Any

import pytest

from lut_ds.engine.guards.badsteps import BadSteps, is_spike
from lut_ds.engine.guards.divergence import odd_ranks
from lut_ds.engine.guards.heartbeat import Beat, describe, ranks_in_words
from lut_ds.errors import RunFault


def beats(*places: tuple[int, str] | None, silent: tuple[int, ...] = ()) -> tuple[dict, dict]:
    """Two readings; ranks in `silent` show no life between them."""
    before = {r: Beat(*place, 1, f"node{r}") if place else None for r, place in enumerate(places)}
    after = {r: b if r in silent or b is None else Beat(b.step, b.phase, 9, b.host) for r, b in before.items()}
    return before, after


def test_a_rank_without_life_is_missing() -> None:
    missing, text = describe(*beats((58, "computing"), (58, "computing"), (57, "computing"), silent=(1,)))
    assert missing == [1]
    assert text.startswith("rank 1 on node1: no sign of life, last seen computing of step 58; ")


def test_a_rank_that_never_began_is_missing() -> None:
    missing, text = describe(*beats((1, "starting"), None))
    assert missing == [1]
    assert text == "rank 1: no sign of life, never began; rank 0: starting of step 1"


def test_ranks_at_an_earlier_step_are_missing() -> None:
    missing, text = describe(*beats((58, "computing"), (57, "computing"), (58, "computing"), (58, "computing")))
    assert missing == [1]
    assert text == "rank 1 on node1: computing of step 57; ranks 0, 2-3: computing of step 58"


@pytest.mark.parametrize("ranks", [2, 5])
def test_a_rank_that_waits_for_data_is_missing(ranks: int) -> None:
    missing, _ = describe(*beats(*[(58, "computing")] * (ranks - 1), (58, "waiting for data")))
    assert missing == [ranks - 1]


def test_ranks_that_all_wait_at_one_place() -> None:
    missing, text = describe(*beats((3, "computing"), (3, "computing")))
    assert missing == []
    assert text == "ranks 0-1: computing of step 3"


def test_ranks_in_words() -> None:
    assert ranks_in_words([3]) == "rank 3"
    assert ranks_in_words([5, 0, 2, 3, 4, 9]) == "ranks 0, 2-5, 9"


def test_the_odd_ranks() -> None:
    assert odd_ranks([7, 7, 3, 7]) == "rank 2 holds another model than the other 3 ranks"
    assert odd_ranks([7, 1, 3, 7, 7]) == "ranks 1-2 hold other models than the other 3 ranks"
    assert odd_ranks([7, 3]) == "ranks hold different models, and no majority says which is right: rank 0 / rank 1"


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"step": number, "loss": 1.0, "lr": 0.5, "applied": 1.0, "loss_limit": 2.0, **values}


BAD = {"applied": 0.0, "loss": float("nan")}


def test_bad_steps_are_counted_over_flushes_and_resumes() -> None:
    bad = BadSteps(3)
    first = [step(1), step(2, **BAD), step(3)]
    bad.count(first)
    assert [r["bad_steps"] for r in first] == [0, 1, 1]
    bad.count([step(4, **BAD), step(5, **BAD)])
    bad.check([])
    resumed = BadSteps(3)
    resumed.load(bad.state())
    last = [step(6, applied=0.0), step(7)]
    resumed.count(last)
    assert last[0]["bad_steps"] == 4
    with pytest.raises(RunFault) as raised:
        resumed.check(["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    text = str(raised.value)
    assert text.startswith("step 6: 3 steps in a row were not applied; in the last the gradient is not finite ")
    assert "at a learning rate of 0.5; rank 0 read a.jpg, b.jpg, c.jpg and 1 more." in text


def test_one_line_names_the_last_bad_step() -> None:
    bad = BadSteps(10)
    records = [step(1, **BAD), step(2), step(3, applied=0.0, loss=2.5)]
    bad.count(records)
    line = bad.describe([records[0], records[2]], ["a.jpg"])
    assert line == (
        "2 steps from 1 to 3 not applied: the loss 2.5 is above its limit 2; rank 0 read a.jpg (2 such steps so far)"
    )


def test_no_number_is_no_spike() -> None:
    assert is_spike(step(1, loss=2.1))
    assert not any(map(is_spike, [step(1, loss=2.0), step(1, **BAD), {**step(1, loss=9.0), "loss_limit": None}]))
