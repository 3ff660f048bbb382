"""Twelve (or so) micro-iterations with accumulation and schedules against stored numbers (golden README, section 2)."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lut_ds.engine.ema import ema_update_
from lut_ds.engine.optim import GuardedAdamW, parameter_groups
from lut_ds.engine.schedules import ema_decay_at, lr_at
from lut_ds.method.lut import LUT, Teacher, cosine_distance, encode_views
from lut_ds.method.names import convert_published, to_published
from tests.golden_data import Golden, assert_states_close, golden_files, load_golden
from tests.method.builders import lut_from, teacher_from


@dataclass
class Trajectory:
    """What the run of our modules gave, in the stored file's words."""

    mae_loss: list[float] = field(default_factory=list)
    bc_terms: list[list[float]] = field(default_factory=list)
    total_loss_over_accum: list[float] = field(default_factory=list)
    micro_lr: list[float] = field(default_factory=list)
    update_lr: list[float] = field(default_factory=list)
    update_grad_norm: list[float] = field(default_factory=list)
    ema_index: list[int] = field(default_factory=list)
    ema_decay: list[float] = field(default_factory=list)
    student: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)


class Run:
    """The published loop, written out with our parts."""

    def __init__(self, golden: Golden) -> None:
        self.golden = golden
        self.student: LUT = lut_from(golden.config).train()
        self.student.load_state_dict(convert_published(golden.group("student")), strict=True)
        self.teacher: Teacher = teacher_from(golden.config)
        # The average of the whole state; the teacher shares the tensors it uses.
        self.average = {name: value.clone() for name, value in self.student.state_dict().items()}
        used = {name: self.average[name] for name in self.teacher.state_dict()}
        self.teacher.load_state_dict(used, strict=True, assign=True)
        self.teacher.requires_grad_(False)
        config = golden.config
        groups = parameter_groups(self.student.named_parameters(), config["weight_decay"])
        self.optimizer = GuardedAdamW(groups, config["lr"], tuple(config["betas"]), config["adam_eps"])
        self.optimizer.found_inf = torch.zeros(())
        self.out = Trajectory()

    def micro_batch(self, index: int, accum: int) -> None:
        """Forward and backward of one micro-batch."""
        views, noise = (self.golden["in.view1"][index], self.golden["in.view2"][index]), self.golden["in.noise"][index]
        teacher_q = self.teacher(views)
        self.record_bc_terms(views, noise, teacher_q)
        losses = self.student(views, noise, teacher_q)
        loss = losses["loss"] / accum
        loss.backward()
        self.out.mae_loss.append(losses["mae"].item())
        self.out.total_loss_over_accum.append(loss.item())

    def record_bc_terms(self, views: tuple[Tensor, Tensor], noise: Tensor, teacher_q: tuple[Tensor, ...]) -> None:
        """The two terms of the loss apart; batch norm's buffers are put back afterwards."""
        buffers = [buffer.clone() for buffer in self.student.buffers()]
        with torch.no_grad():
            latent = encode_views(self.student.encoder, views, self.student.mask(noise).ids_keep)
            q1, q2 = self.student.predict(latent)
            pairs = ((q2, teacher_q[0]), (q1, teacher_q[1]))
            self.out.bc_terms.append([cosine_distance(q, t).mean().item() for q, t in pairs])
            for buffer, before in zip(self.student.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def update(self, index: int, total: int) -> None:
        """Optimizer step, then EMA."""
        gradients = [p.grad for p in self.student.parameters()]
        self.out.update_grad_norm.append(torch.nn.utils.get_total_norm(gradients).item())
        self.out.update_lr.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = ema_decay_at(index, total, self.golden.config["ema_decay"])
        state = self.student.state_dict()
        ema_update_(list(self.average.values()), [state[name] for name in self.average], 1.0 - decay)
        self.out.ema_index.append(index)
        self.out.ema_decay.append(decay)

    def __call__(self) -> Trajectory:
        """All epochs."""
        schedule, config = self.golden.meta["schedule"], self.golden.config
        iters, accum, epochs = schedule["iters_per_epoch"], schedule["accum_iter"], schedule["epochs"]
        for epoch in range(epochs):
            self.optimizer.zero_grad()  # gradients of left-over micro-batches are thrown away
            for i in range(iters):
                if i % accum == 0:
                    x = epoch + i / iters
                    lr = lr_at(x, config["lr"], schedule["min_lr"], schedule["warmup_epochs"], epochs)
                    for group in self.optimizer.param_groups:
                        group["lr"] = lr
                self.out.micro_lr.append(self.optimizer.param_groups[0]["lr"])
                self.micro_batch(epoch * iters + i, accum)
                if (i + 1) % accum == 0:
                    self.update(epoch * iters + i, epochs * iters)
        self.out.student, self.out.average = self.student.state_dict(), self.average
        return self.out


@pytest.fixture(scope="module", params=golden_files("lut_traj*.safetensors"), ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    """The stored trajectory."""
    return load_golden(request.param)


@pytest.fixture(scope="module")
def trajectory(golden: Golden) -> Trajectory:
    """Ours."""
    return Run(golden)()


def test_golden_trajectory_losses(golden: Golden, trajectory: Trajectory) -> None:
    for name in ("mae_loss", "bc_terms", "total_loss_over_accum"):
        found = torch.tensor(getattr(trajectory, name), dtype=torch.float64)
        torch.testing.assert_close(found, golden[f"out.{name}"], atol=1e-5, rtol=0, msg=lambda text, n=name: n + text)


def test_golden_trajectory_schedules(golden: Golden, trajectory: Trajectory) -> None:
    assert trajectory.ema_index == golden["out.ema_index"].tolist()
    for name in ("micro_lr", "update_lr", "ema_decay"):
        assert getattr(trajectory, name) == pytest.approx(golden[f"out.{name}"].tolist(), rel=1e-12, abs=1e-12)
    assert trajectory.update_lr[0] == 0.0


def test_golden_trajectory_gradient_norms(golden: Golden, trajectory: Trajectory) -> None:
    found = torch.tensor(trajectory.update_grad_norm, dtype=torch.float64)
    torch.testing.assert_close(found, golden["out.update_grad_norm"], atol=1e-4, rtol=0)


def test_golden_trajectory_final_states(golden: Golden, trajectory: Trajectory) -> None:
    for found, prefix in ((trajectory.student, "step"), (trajectory.average, "ema")):
        published = {to_published(name): value for name, value in found.items()}
        assert_states_close(published, golden.group(prefix), atol=1e-4, skip_noise=True)
