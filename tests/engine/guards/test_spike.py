"""The limit of the loss: silent on ordinary curves, passed by spikes, and the same after a resume."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lut_ds.engine.guards.spike import LossWindow, loss_limit

WINDOW, SIGMAS = 32, 8.0
YES, NO = torch.tensor(1.0), torch.tensor(0.0)
CPU = torch.device("cpu")
curves = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "level": st.floats(0.05, 8),
        "drop": st.floats(0, 5),
        "rate": st.floats(0.001, 0.5),
        "noise": st.floats(0, 0.1),
        "drift": st.floats(-0.002, 0.002),
    }
)


def curve(shape: dict[str, float], steps: int = 200) -> Tensor:
    """level * (1 + drop * exp(-rate * step)) with relative noise and a linear drift: float32 [steps]."""
    rng, step = np.random.default_rng(int(shape["seed"])), np.arange(steps)
    smooth = shape["level"] * (1 + shape["drop"] * np.exp(-shape["rate"] * step) + shape["drift"] * step)
    return torch.tensor(smooth * (1 + shape["noise"] * rng.standard_normal(steps)), dtype=torch.float32)


def limits(losses: Tensor, window: LossWindow) -> list[float]:
    """The limit that each loss is held against."""
    found = []
    for loss in losses:
        found.append(window.limit().item())
        window.add(loss, YES)
    return found


@settings(max_examples=60, deadline=None)
@given(curves)
def test_no_alarm_on_a_smooth_curve_with_noise(shape: dict[str, float]) -> None:
    losses = curve(shape)
    found = limits(losses, LossWindow(WINDOW, SIGMAS, CPU))
    assert all(math.isinf(limit) for limit in found[:WINDOW])
    assert all(loss <= limit for loss, limit in zip(losses.tolist(), found, strict=True))


@settings(max_examples=60, deadline=None)
@given(curves, st.integers(WINDOW + 20, 150), st.floats(1.5, 50))
def test_a_spike_passes_the_limit(shape: dict[str, float], at: int, height: float) -> None:
    # Past the steep part: while the loss itself falls by half within a window, twice the loss is nothing unusual.
    losses = curve({**shape, "noise": shape["noise"] / 5, "rate": max(shape["rate"], 0.25)})
    window = LossWindow(WINDOW, SIGMAS, CPU)
    limits(losses[:at], window)
    assert losses[at].item() * height > window.limit().item()


@given(st.lists(st.floats(0.125, 10, width=32), min_size=1, max_size=60))
def test_the_limit_is_median_and_deviation_of_the_last_losses(values: list[float]) -> None:
    window = LossWindow(9, 3.0, CPU)
    for value in values:
        window.add(torch.tensor(value), YES)
    kept = sorted(values[-9:])
    if len(kept) < 9:
        assert math.isinf(window.limit().item())
    else:
        spread = sorted(abs(value - kept[4]) for value in kept)[4]
        expected = kept[4] + max(3.0 * 1.4826 * spread, 0.05 * kept[4])
        assert math.isclose(window.limit().item(), expected, rel_tol=1e-5)


def test_steps_that_were_not_applied_are_not_usual() -> None:
    window = LossWindow(8, SIGMAS, CPU)
    limits(torch.linspace(1.0, 1.1, 8), window)
    before = window.limit().item()
    for bad in (1e4, float("nan"), float("inf")):
        window.add(torch.tensor(bad), NO)
    assert window.limit().item() == before


def test_a_limit_on_a_constant_curve_leaves_room_for_rounding() -> None:
    assert loss_limit(torch.full((16,), 2.0), SIGMAS).item() > 2.09


@given(st.lists(st.floats(0.125, 10, width=32), max_size=30))
def test_a_checkpoint_keeps_the_window(values: list[float]) -> None:
    window, other = LossWindow(9, SIGMAS, CPU), LossWindow(9, SIGMAS, CPU)
    for value in values:
        window.add(torch.tensor(value), YES)
    other.load(window.state())
    for value in (1.0, 2.0, 3.0):
        assert window.limit().item() == other.limit().item()
        window.add(torch.tensor(value), YES)
        other.add(torch.tensor(value), YES)


def test_a_window_of_another_size_keeps_the_newest() -> None:
    window = LossWindow(8, SIGMAS, CPU)
    window.load([100.0, *range(1, 9)])
    assert window.state() == list(range(1, 9))
