"""Mean corruption error against numbers worked out by hand."""

import pytest

from lut_ds.transfer.robustness.corruptions import MEASURED
from lut_ds.transfer.robustness.scores import ALEXNET, ALEXNET_CLEAN, corruption_scores


def table(error):
    """Top-1 by corruption and severity from a mean error for each corruption."""
    return {name: {s: 100 - error[name] + (s - 3) for s in (1, 2, 3, 4, 5)} for name in MEASURED}


def test_alexnet_is_its_own_measure():
    found = corruption_scores(table(ALEXNET), 100 - ALEXNET_CLEAN, 1000, 224)
    assert found["mce"] == pytest.approx(100)
    assert found["relative_mce"] == pytest.approx(100)
    assert found["mean_error"] == pytest.approx(sum(ALEXNET.values()) / 15)
    assert found["no_mce"] is None
    assert sum(ALEXNET.values()) / 15 == pytest.approx(78.4, abs=1.0)


def test_half_of_its_errors():
    found = corruption_scores(table({name: value / 2 for name, value in ALEXNET.items()}), None, 1000, 224)
    assert found["mce"] == pytest.approx(50)
    assert found["relative_mce"] is None


def test_extra_corruptions_count_in_no_mean():
    with_extra = {**table(ALEXNET), "spatter": dict.fromkeys((1, 2, 3, 4, 5), 0.0)}
    found = corruption_scores(with_extra, None, 1000, 224)
    assert found["mce"] == pytest.approx(100)
    assert found["error"]["spatter"] == 100


@pytest.mark.parametrize(
    ("change", "classes", "side", "why"),
    [
        ({}, 10, 224, "this is 10 classes at 224"),
        ({}, 1000, 32, "this is 1000 classes at 32"),
        ({"fog": None}, 1000, 224, "1 of the 15 corruptions were not measured (fog"),
        ({"fog": {1: 50.0, 3: 50.0}}, 1000, 224, "not all of the five severities"),
    ],
)
def test_where_it_is_not_defined_it_is_not_given(change, classes, side, why):
    top1 = {k: v for k, v in {**table(ALEXNET), **change}.items() if v is not None}
    found = corruption_scores(top1, 50.0, classes, side)
    assert (found["mce"], found["relative_mce"]) == (None, None)
    assert found["mean_error"] is not None
    assert why in found["no_mce"]
