"""Learning rate and EMA decay against stored numbers (golden README, section 5), and their shape."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lut_ds.engine.schedules import cosine_schedule, ema_decay_at, lr_at, peak_lr
from tests.golden_data import golden_json

STORED = golden_json("schedules.json")
EXACT = {"rel": 1e-12, "abs": 1e-12}


def check_lr(stored: dict[str, Any], sqrt_divisor: float) -> None:
    """One stored learning-rate curve, both rules."""
    batch = stored["effective_batch"]
    peak = peak_lr(stored["blr"], batch, "sqrt", sqrt_divisor)
    assert peak == pytest.approx(stored["peak_lr"], **EXACT)
    assert peak_lr(stored["blr"], batch, "linear") == pytest.approx(stored["linear_rule_lr"], **EXACT)
    found = [
        lr_at(epoch, peak, stored["min_lr"], stored["warmup_epochs"], stored["epochs"])
        for epoch in stored["fractional_epoch"]
    ]
    assert found == pytest.approx(stored["lr"], **EXACT)


@pytest.mark.parametrize("stored", STORED["pretrain_lr"], ids=lambda stored: str(stored["effective_batch"]))
def test_golden_pretrain_lr(stored: dict[str, Any]) -> None:
    check_lr(stored, sqrt_divisor=4.0)


@pytest.mark.parametrize("stored", STORED["finetune_lr"], ids=lambda stored: str(stored["effective_batch"]))
def test_golden_finetune_lr(stored: dict[str, Any]) -> None:
    check_lr(stored, sqrt_divisor=8.0)


def test_golden_ema_decay() -> None:
    stored = STORED["ema_decay"]
    total = stored["epochs"] * stored["iters_per_epoch"]
    assert total == stored["length"]
    found = [ema_decay_at(i, total, stored["base"], stored["final"]) for i in stored["iteration"]]
    assert found == pytest.approx(stored["decay"], rel=0, abs=1e-12)
    assert ema_decay_at(total - 1, total, stored["base"]) < 1.0
    table = cosine_schedule(stored["base"], stored["final"], stored["epochs"], stored["iters_per_epoch"])
    assert math.fsum(table) == pytest.approx(stored["sum"], rel=1e-12)
    assert [table[i] for i in stored["iteration"]] == pytest.approx(found, rel=0, abs=1e-12)
    assert 1.0 - table[-1] == pytest.approx(stored["one_minus_last"], rel=0, abs=1e-12)


def test_golden_cosine_table_with_warmup() -> None:
    stored = STORED["cosine_scheduler_with_warmup"]
    keys = ("base", "final", "epochs", "iters_per_epoch", "warmup_epochs", "start")
    table = cosine_schedule(**{key: stored[key] for key in keys})
    assert len(table) == len(stored["values"])
    assert table.tolist() == pytest.approx(stored["values"], **EXACT)


@pytest.mark.parametrize("divisor,batch", [(4.0, 4096), (8.0, 1024)])
def test_rules_meet_at_one_batch_size_only(divisor: float, batch: int) -> None:
    assert peak_lr(1e-3, batch, "sqrt", divisor) == pytest.approx(peak_lr(1e-3, batch, "linear"), rel=1e-12)
    assert peak_lr(1e-3, 2 * batch, "sqrt", divisor) < peak_lr(1e-3, 2 * batch, "linear")


@given(
    peak=st.floats(1e-6, 1.0),
    share=st.floats(0, 1),
    warmup=st.floats(0.0, 50.0),
    rest=st.floats(0.5, 500.0),
    at=st.floats(0, 1),
)
def test_lr_stays_between_zero_and_peak(peak: float, share: float, warmup: float, rest: float, at: float) -> None:
    minimum, epochs = peak * share, warmup + rest
    value = lr_at(at * epochs, peak, minimum, warmup, epochs)
    assert -1e-15 <= value <= peak * (1 + 1e-9)
    if at * epochs >= warmup:
        assert value >= minimum * (1 - 1e-9)


def test_lr_ends() -> None:
    assert lr_at(0.0, 0.5, 0.1, 2.0, 10.0) == 0.0
    assert lr_at(2.0, 0.5, 0.1, 2.0, 10.0) == pytest.approx(0.5, rel=1e-12)
    assert lr_at(10.0, 0.5, 0.1, 2.0, 10.0) == pytest.approx(0.1, rel=1e-12)
    assert lr_at(0.0, 0.5, 0.1, 0.0, 10.0) == pytest.approx(0.5, rel=1e-12)


@given(total=st.integers(2, 10**6), base=st.floats(0.5, 0.9999), share=st.floats(0, 1))
def test_ema_decay_grows_from_base_to_one(total: int, base: float, share: float) -> None:
    index = share * (total - 1)
    assert ema_decay_at(0, total, base) == pytest.approx(base, rel=1e-12)
    assert ema_decay_at(total, total, base) == pytest.approx(1.0, rel=1e-12)
    assert ema_decay_at(index, total, base) <= ema_decay_at(index + 1, total, base) + 1e-15


@given(epochs=st.integers(1, 6), iters=st.integers(1, 9), base=st.floats(0.1, 1.0), final=st.floats(0.0, 1.0))
def test_cosine_table_equals_the_pointwise_schedule(epochs: int, iters: int, base: float, final: float) -> None:
    table = cosine_schedule(base, final, epochs, iters)
    pointwise = [ema_decay_at(i, epochs * iters, base, final) for i in range(epochs * iters)]
    assert np.allclose(table, pointwise, rtol=0, atol=1e-12)
