"""One MAE iteration against the stored numbers of the published implementation (golden README, section 3)."""

from dataclasses import dataclass

import pytest
import torch
from lut_kernels import gather_patches
from torch import Tensor

from lut_ds.engine.optim import GuardedAdamW, parameter_groups
from lut_ds.method.lut import MAE, encode_views
from lut_ds.method.names import convert_published, to_published
from tests.golden_data import Golden, assert_states_close, golden_files, load_golden
from tests.method.builders import mae_from

FORWARD = {"atol": 2e-5, "rtol": 0}


@dataclass
class Case:
    """A golden file, the model before its step, and the losses (gradients are on the model)."""

    golden: Golden
    model: MAE
    losses: dict[str, Tensor]


def model_of(golden: Golden) -> MAE:
    """The stored model before its step."""
    model = mae_from(golden.config)
    model.load_state_dict(convert_published(golden.group("model")), strict=True)
    return model


@pytest.fixture(scope="module", params=golden_files("mae_[a-z].safetensors"), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    """The loss and gradients of one iteration; the weights have not moved yet."""
    golden = load_golden(request.param)
    model = model_of(golden)
    losses = model([golden["in.view"]], golden["in.noise"])
    losses["loss"].backward()
    return Case(golden, model, losses)


def test_golden_mae_masks(case: Case) -> None:
    masking = case.model.mask(case.golden["in.noise"])
    assert torch.equal(masking.ids_restore, case.golden["out.ids_restore"])
    assert torch.equal(masking.mask(0), case.golden["out.mask"])
    assert [ids.shape[1] for ids in masking.ids_keep] == [case.golden.meta["len_keep"]]


def test_golden_mae_forward(case: Case) -> None:
    golden, model = case.golden, case.model
    masking = model.mask(golden["in.noise"])
    latent = encode_views(model.encoder, [golden["in.view"]], masking.ids_keep)
    torch.testing.assert_close(latent, golden["out.latent"], **FORWARD)
    torch.testing.assert_close(model.decoder(latent, masking.ids_restore), golden["out.pred"], **FORWARD)
    torch.testing.assert_close(case.losses["loss"].detach(), golden["out.loss"], atol=5e-6, rtol=0)


def test_golden_mae_patch_order(case: Case) -> None:
    golden, patch = case.golden, case.golden.config["patch_size"]
    assert torch.equal(gather_patches(golden["in.view"], None, patch), golden["out.patchified_input"])
    assert torch.equal(gather_patches(golden["out.unpatchified_pred"], None, patch), golden["out.pred"])


def test_golden_mae_gradients(case: Case) -> None:
    gradients = {to_published(name): p.grad for name, p in case.model.named_parameters()}
    assert_states_close(gradients, case.golden.group("grad"), atol=3e-6, skip_noise=True)


def test_golden_mae_adamw_step(case: Case) -> None:
    config, gradients = case.golden.config, convert_published(case.golden.group("grad"))
    model = model_of(case.golden)
    groups = parameter_groups(model.named_parameters(), config["weight_decay"])
    optimizer = GuardedAdamW(groups, config["lr"], tuple(config["betas"]), config.get("adam_eps", 1e-8))
    optimizer.found_inf = torch.zeros(())
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    found = {to_published(name): value for name, value in model.state_dict().items()}
    assert_states_close(found, case.golden.group("step"), atol=2e-6)
