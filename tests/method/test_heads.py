"""Projector and predictor heads, and batch norm with statistics shared between ranks."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lut_ds.method.heads import HeadBatchNorm, make_head
from tests.method.builders import bfloat16_weights, randomise
from tests.method.two_ranks import WORLD, backward, head_of_all, synchronised_rank, views_for


@settings(deadline=None, max_examples=40)
@given(depth=st.integers(0, 4), norm=st.sampled_from(["bn", "ln", "none"]), act=st.sampled_from(["relu", "gelu"]))
def test_layout(depth: int, norm: str, act: str) -> None:
    head = make_head(depth, 8, 12, norm, act)
    stride = 2 if norm == "none" else 3
    linears = {name: layer for name, layer in head.named_children() if isinstance(layer, nn.Linear)}
    assert [int(name) for name in linears] == [stride * i for i in range(depth)]
    assert all(layer.bias is None for layer in linears.values())
    shapes = [(layer.in_features, layer.out_features) for layer in linears.values()]
    widths = [8, *[12] * (depth - 1), 8] if depth else []
    assert shapes == list(pairwise(widths))
    assert len(head) == max(0, depth * stride - stride + 1)  # no norm and no activation after the last linear
    kinds = {"bn": HeadBatchNorm, "ln": nn.LayerNorm, "none": None}
    activations = {"relu": nn.ReLU, "gelu": nn.GELU}
    for i in range(depth - 1):
        after = list(head)[stride * i + 1 : stride * (i + 1)]
        assert isinstance(after[-1], activations[act])
        assert norm == "none" or isinstance(after[0], kinds[norm])
    x = torch.randn(5, 8)
    assert torch.equal(head(x), x) if depth == 0 else head(x).shape == (5, 8)


def test_initial_weights_are_xavier_uniform() -> None:
    torch.manual_seed(0)
    for layer in make_head(3, 32, 64, "none", "relu"):
        if isinstance(layer, nn.Linear):
            limit = (6 / (layer.in_features + layer.out_features)) ** 0.5
            assert layer.weight.abs().max() <= limit
            assert layer.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)


def test_norm_constants() -> None:
    batch, layer = make_head(2, 8, 12, "bn", "relu")[1], make_head(2, 8, 12, "ln", "relu")[1]
    assert (batch.eps, batch.momentum, layer.eps) == (1e-5, 0.1, 1e-6)


def twins(width: int, shared: bool) -> tuple[HeadBatchNorm, nn.BatchNorm1d]:
    """Our batch norm (alone, or as one of one ranks) and torch's, equal random weights and buffers."""
    ours = HeadBatchNorm(width)
    randomise(ours)
    theirs = nn.BatchNorm1d(width)
    theirs.load_state_dict(ours.state_dict())
    if shared:
        ours.all_reduce_sum = lambda x: x.clone()
    return ours, theirs


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), batch=st.integers(4, 9), shared=st.booleans(), steps=st.integers(1, 3))
def test_one_rank_equals_torch(seed: int, batch: int, shared: bool, steps: int) -> None:
    torch.manual_seed(seed)
    ours, theirs = twins(6, shared)
    for _ in range(steps):
        x = torch.randn(batch, 6) * 3 + 1
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        weight = torch.randn(batch, 6)
        outputs = [norm(i) for norm, i in zip((ours, theirs), inputs, strict=True)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        for output in outputs:
            (output * weight).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_eval_uses_running_statistics_and_moves_nothing(shared: bool) -> None:
    ours, theirs = twins(6, shared)
    before, x = copy.deepcopy(ours.state_dict()), torch.randn(4, 6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("shared", [False, True])
def test_bfloat16_weights_leave_statistics_in_float32(shared: bool) -> None:
    ours, _ = twins(6, shared)
    narrow = copy.deepcopy(ours)
    bfloat16_weights(narrow)
    x = torch.randn(64, 6).bfloat16()
    y = narrow(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ours(x.float()), atol=0.05, rtol=0.02)
    torch.testing.assert_close(narrow.running_mean, ours.running_mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(narrow.running_var, ours.running_var, atol=1e-6, rtol=1e-6)
    assert narrow.eval()(x).dtype == torch.bfloat16


def test_two_ranks_equal_the_full_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(synchronised_rank, args=(str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    # Plain batch norm over the batches of all ranks together.
    whole = backward(head_of_all(), [torch.cat(views) for views in zip(*map(views_for, range(WORLD)), strict=True)])
    close = {"atol": 1e-4, "rtol": 1e-5}
    for key in ("outputs", "inputs"):
        for view in range(2):
            together = torch.cat([rank[key][view] for rank in ranks])
            torch.testing.assert_close(together, whole[key][view], **close)
    summed = [sum(gradients) for gradients in zip(*(rank["weights"] for rank in ranks), strict=True)]
    torch.testing.assert_close(summed, whole["weights"], **close)
    for rank in ranks:
        torch.testing.assert_close(rank["buffers"], whole["buffers"], atol=1e-5, rtol=1e-5)
    assert int(whole["buffers"][2]) == 2  # the counter moves once a view
