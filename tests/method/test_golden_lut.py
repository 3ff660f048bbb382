"""One LUT iteration against the stored numbers of the published implementation (golden README, section 1)."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lut_ds.engine.ema import ema_update_
from lut_ds.engine.optim import GuardedAdamW, parameter_groups
from lut_ds.method.lut import LUT, Teacher, encode_views
from lut_ds.method.names import convert_published, from_published, to_published
from tests.golden_data import Golden, assert_states_close, golden_files, load_golden
from tests.method.builders import load_teacher, lut_from, teacher_from

FORWARD = {"atol": 2e-5, "rtol": 0}
LOSS = {"atol": 5e-6, "rtol": 0}


def student_of(golden: Golden) -> LUT:
    """The stored student before its step, in training mode."""
    student = lut_from(golden.config)
    student.load_state_dict(convert_published(golden.group("student")), strict=True)
    return student.train()


def teacher_of(golden: Golden) -> Teacher:
    """The stored teacher."""
    teacher = teacher_from(golden.config)
    load_teacher(teacher, golden.group("teacher"))
    return teacher


@dataclass
class Case:
    """A golden file and what our modules compute from its inputs."""

    golden: Golden
    views: tuple[Tensor, Tensor]
    teacher: Teacher
    student: LUT
    losses: dict[str, Tensor]


@pytest.fixture(scope="module", params=golden_files("lut_[a-z].safetensors"), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    """The losses and gradients of one iteration; the student's weights have not moved yet."""
    golden = load_golden(request.param)
    views = (golden["in.view1"], golden["in.view2"])
    teacher, student = teacher_of(golden), student_of(golden)
    losses = student(views, golden["in.noise"], teacher(views))
    losses["loss"].backward()
    return Case(golden, views, teacher, student, losses)


def test_golden_masks(case: Case) -> None:
    masking = case.student.mask(case.golden["in.noise"])
    assert torch.equal(masking.ids_restore, case.golden["out.ids_restore"])
    assert torch.equal(masking.mask(0), case.golden["out.mask1"])
    assert torch.equal(masking.mask(1), case.golden["out.mask2"])
    assert [ids.shape[1] for ids in masking.ids_keep] == [case.golden.meta["len_keep"]] * 2


def test_golden_student_forward(case: Case) -> None:
    golden, student = case.golden, student_of(case.golden)
    masking = student.mask(golden["in.noise"])
    latent = encode_views(student.encoder, case.views, masking.ids_keep)
    torch.testing.assert_close(latent, torch.cat([golden["out.latent1"], golden["out.latent2"]]), **FORWARD)
    first = latent[: len(golden["in.noise"])]
    torch.testing.assert_close(student.decoder(first, masking.ids_restore), golden["out.pred"], **FORWARD)
    torch.testing.assert_close(torch.cat(student.predict(latent)), golden["out.student_q"], **FORWARD)


def test_golden_teacher_forward(case: Case) -> None:
    golden = case.golden
    latents = encode_views(case.teacher.encoder, case.views, None)
    expected = torch.cat([golden["out.teacher_latent1"], golden["out.teacher_latent2"]])
    torch.testing.assert_close(latents, expected, **FORWARD)
    torch.testing.assert_close(torch.cat(case.teacher(case.views)), golden["out.teacher_q"], **FORWARD)


def test_golden_losses(case: Case) -> None:
    for ours, stored in {"mae": "mae_loss", "bc": "bc_loss", "loss": "total_loss"}.items():
        torch.testing.assert_close(case.losses[ours].detach(), case.golden[f"out.{stored}"], **LOSS)


def test_golden_gradients(case: Case) -> None:
    gradients = {to_published(name): p.grad for name, p in case.student.named_parameters()}
    expected = case.golden["out.grad_norm"]
    scale = max(1.0, expected.item())  # rounding noise grows with the gradient
    assert_states_close(gradients, case.golden.group("grad"), atol=3e-6 * scale, skip_noise=True)
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    torch.testing.assert_close(norm, expected, atol=1e-5 * scale, rtol=0)


def test_golden_batch_norm_buffers(case: Case) -> None:
    moved = {to_published(name): buffer for name, buffer in case.student.named_buffers() if "pos_embed" not in name}
    assert_states_close(moved, case.golden.group("bn"), atol=1e-5)


def test_golden_adamw_step(case: Case) -> None:
    config, gradients = case.golden.config, convert_published(case.golden.group("grad"))
    student = student_of(case.golden)
    student(case.views, case.golden["in.noise"], case.teacher(case.views))  # moves the batch norm buffers
    groups = parameter_groups(student.named_parameters(), config["weight_decay"])
    optimizer = GuardedAdamW(groups, config["lr"], tuple(config["betas"]), config["adam_eps"])
    optimizer.found_inf = torch.zeros(())
    for name, parameter in student.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    stored = case.golden.group("step")
    found = {to_published(name): value for name, value in student.state_dict().items()}
    moved_by_forward = case.golden.group("bn").keys()
    assert_states_close(
        {name: value for name, value in found.items() if name not in moved_by_forward},
        {name: value for name, value in stored.items() if name not in moved_by_forward},
        atol=2e-6,
    )
    assert_states_close(
        {name: found[name] for name in moved_by_forward}, {name: stored[name] for name in moved_by_forward}, atol=1e-5
    )


def test_golden_adamw_groups(case: Case) -> None:
    expected = case.golden.meta["adamw_groups"]
    groups = parameter_groups(case.student.named_parameters(), 0.3)
    found = {group["weight_decay"]: group["names"] for group in groups}
    assert found.keys() == {0.3, 0.0}
    assert set(found[0.3]) == {from_published(name) for name in expected["decay"]}
    assert set(found[0.0]) == {from_published(name) for name in expected["no_decay"]}
    assert sum(len(group["params"]) for group in groups) == len(list(case.student.parameters()))


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_golden_ema(case: Case, on_device: bool) -> None:
    averages = {name: value.clone() for name, value in case.golden.group("teacher").items()}
    values = case.golden.group("step")
    weight = 1.0 - case.golden.config["ema_decay"]
    ema_update_(
        list(averages.values()), [values[name] for name in averages], torch.tensor(weight) if on_device else weight
    )
    assert_states_close(averages, case.golden.group("ema"), atol=1e-6)
