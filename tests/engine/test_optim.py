"""Parameter groups, and the AdamW that a flag holds back."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lut_ds.engine.optim import GuardedAdamW, decays, parameter_groups

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}


def small_net(seed: int = 0) -> nn.Sequential:
    """Matrices, biases and a norm."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3))


def set_gradients(net: nn.Module, seed: int) -> None:
    """Gradients that depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def values(net: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in net.parameters()]


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of moments and step counts, in the order of parameters."""
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


def guarded(net: nn.Module, found_inf: float) -> GuardedAdamW:
    """Our optimizer on our groups."""
    optimizer = GuardedAdamW(parameter_groups(net.named_parameters(), 0.1), **SETTINGS)
    optimizer.found_inf = torch.tensor(found_inf)
    return optimizer


@pytest.mark.parametrize(
    "name,shape,expected",
    [
        ("encoder.cls_token", (1, 1, 8), True),
        ("decoder.mask_token", (1, 1, 8), True),
        ("encoder.patch_embed.proj.weight", (8, 3, 4, 4), True),
        ("projector.0.weight", (8, 8), True),
        ("encoder.norm.weight", (8,), False),
        ("encoder.blocks.0.attn.qkv.bias", (24,), False),
        ("odd.bias", (2, 2), False),
        ("projector.1.weight", (8,), False),
    ],
)
def test_what_decays(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, torch.zeros(shape)) is expected


def test_groups_cover_each_trainable_parameter_once() -> None:
    net = small_net()
    net[0].weight.requires_grad_(False)
    groups = parameter_groups(net.named_parameters(), 0.1)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in net.named_parameters() if p.requires_grad)
    by_name = dict(net.named_parameters())
    for group in groups:
        assert all(by_name[name] is parameter for name, parameter in zip(group["names"], group["params"], strict=True))
        assert all(group["weight_decay"] == (0.1 if decays(n, by_name[n]) else 0.0) for n in group["names"])


def test_a_group_without_members_is_left_out() -> None:
    norm = nn.LayerNorm(4)
    assert [group["weight_decay"] for group in parameter_groups(norm.named_parameters(), 0.1)] == [0.0]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 5))
def test_equals_plain_adamw_where_gradients_are_finite(seed: int, steps: int) -> None:
    net, twin = small_net(seed), small_net(seed)
    optimizer = guarded(net, 0.0)
    plain = torch.optim.AdamW(parameter_groups(twin.named_parameters(), 0.1), **SETTINGS, fused=False, foreach=False)
    for step in range(steps):
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = 0.01 * step  # a warm-up from zero, as in training
        set_gradients(net, seed + step)
        set_gradients(twin, seed + step)
        optimizer.step()
        plain.step()
    torch.testing.assert_close(values(net), values(twin), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(optimizer_state(optimizer), optimizer_state(plain), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1.0])
def test_a_flagged_first_step_changes_nothing(poison: float) -> None:
    net = small_net()
    before, optimizer = values(net), guarded(net, 1.0)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, poison)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(net), before, strict=True))
    assert all(not value.any() for value in optimizer_state(optimizer))


def test_a_flagged_step_in_between_leaves_no_trace() -> None:
    net, twin = small_net(), small_net()
    optimizer, plain = guarded(net, 0.0), guarded(twin, 0.0)
    for step in range(4):
        set_gradients(net, step)
        set_gradients(twin, step)
        optimizer.found_inf.zero_()
        optimizer.step()
        plain.step()
        before, moments = values(net), optimizer_state(optimizer)
        for parameter in net.parameters():
            parameter.grad.fill_(float("nan"))
        optimizer.found_inf.fill_(1.0)
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(values(net), before, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(optimizer_state(optimizer), moments, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values(net), values(twin), strict=True))
    assert all(value.isfinite().all() for value in optimizer_state(optimizer))
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}


def test_state_dict_continues_bit_for_bit() -> None:
    net = small_net()
    optimizer = guarded(net, 0.0)
    set_gradients(net, 0)
    optimizer.step()
    twin = copy.deepcopy(net)
    resumed = guarded(twin, 0.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the moments otherwise
    for one, opt in ((net, optimizer), (twin, resumed)):
        set_gradients(one, 1)
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(values(net), values(twin), strict=True))
