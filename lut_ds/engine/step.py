"""One optimizer step: micro-batches through teacher and student, gradients through ZeRO, EMA, all guarded on the device."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
from torch import Tensor, nn

from lut_ds.config import Recipe, RunRecipe
from lut_ds.engine.beside import BesideTeacher
from lut_ds.engine.build import build_student, build_teacher, check_fp8, compile_blocks
from lut_ds.engine.ds_config import load_ds_config, resolve_ds_config, zero_stage
from lut_ds.engine.ema import WeightEMA
from lut_ds.engine.guards.spike import LossWindow
from lut_ds.engine.guards.vitals import LocalClock
from lut_ds.engine.launch import Ranks
from lut_ds.engine.optim import GuardedAdamW, parameter_groups
from lut_ds.engine.reductions import gradient_norm, keep_host_running
from lut_ds.engine.shards import MasterShards
from lut_ds.errors import UserError
from lut_ds.method.heads import HeadBatchNorm
from lut_ds.method.lut import Projections


class MicroBatch(Protocol):
    """What the step needs of a batch, on the training device.

    Views (uint8 [b, V, V, 3] each), mask noise [b, L], and uniform draws [b, k] where a degradation needs them.
    """

    views: list[Tensor]
    noise: Tensor
    draws: Tensor | None


class Votes(NamedTuple):
    """What a rank tells the others with every step; the numbers of ranks that say so come back with the metrics."""

    stop: bool = False
    """Stop at the next flush and save."""
    busy: bool = False
    """A background write of this rank is not done."""


NO_VOTES = Votes()


class Learner(NamedTuple):
    """What a `Trainer` trains."""

    student: nn.Module
    """Initialised alike on every rank; parameters are fp32."""
    teacher: nn.Module | None
    """Takes the average of the student's weights; its parameters are named as the student's."""
    metric_names: tuple[str, ...]
    """Of the losses that a micro-batch gives; the first is the one that the guards watch."""
    groups: list[dict[str, Any]]
    """AdamW's; one with `lr_scale` has that many times the schedule's learning rate."""
    beside: bool = False
    """On a GPU, run the teacher on a stream of its own, beside the student."""


def pretraining(recipe: Recipe, device: torch.device) -> Learner:
    """Student and teacher of a pre-training recipe, on the device."""
    check_fp8(recipe, device)
    student = build_student(recipe).to(device)
    teacher = build_teacher(recipe, student, device)
    names = ("loss", "mae", "bc", "feature_spread") if teacher is not None else ("loss", "mae", "feature_spread")
    # Groups of their own for what the teacher has: only their averages have to be gathered.
    shared = set(dict(teacher.named_parameters())) if teacher is not None else set()
    parts = [[(n, p) for n, p in student.named_parameters() if (n in shared) is wanted] for wanted in (True, False)]
    groups = [group for part in parts for group in parameter_groups(part, recipe.optim.weight_decay)]
    return Learner(student, teacher, names, groups, recipe.train.overlap_teacher)


class Trainer:
    """Student under DeepSpeed, teacher, EMA and the guards around a step.

    Args:
        recipe: validated recipe.
        ranks: this process's place; the process group exists.
        micro_batch, accumulation: sizes that make up the global batch.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, micro_batch: int, accumulation: int) -> None:
        self._set_up(recipe, pretraining(recipe, ranks.device), ranks, micro_batch, accumulation)

    def _set_up(self, recipe: RunRecipe, learner: Learner, ranks: Ranks, micro_batch: int, accumulation: int) -> None:
        import deepspeed

        ds_config = load_ds_config(recipe)
        self.stage = zero_stage(ds_config)
        self.accumulation = accumulation
        self.device = ranks.device
        student, self.teacher, self.metric_names, groups, beside = learner
        synchronise_batch_norm(student, ranks.world_size)
        if recipe.train.compile is True or (recipe.train.compile == "auto" and ranks.device.type == "cuda"):
            # ZeRO-3's hooks are traced into the student's blocks, with a graph for each: more recompiles than torch allows.
            compile_blocks(None if self.stage == 3 else student, self.teacher)
        self._beside = None
        if beside and self.teacher is not None and ranks.device.type == "cuda":
            self._beside = BesideTeacher(self.teacher, ranks.device)
        client = GuardedAdamW(groups, lr=0.0, betas=recipe.optim.betas, eps=recipe.optim.eps)
        fp32_buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        self.engine, *_ = deepspeed.initialize(
            model=student,
            optimizer=client,
            config=resolve_ds_config(ds_config, recipe, micro_batch, accumulation, ranks.world_size),
            dist_init_required=False,
        )
        self.student: nn.Module = self.engine.module
        _keep_buffers(self.student, fp32_buffers)
        self.shards = MasterShards(self.engine, self.student, self.stage)
        self.ema = WeightEMA(self.shards, self.student, self.teacher) if self.teacher is not None else None
        self._batch_norm = [b for m in self.student.modules() if isinstance(m, HeadBatchNorm) for b in m.buffers()]
        self._blocked = torch.zeros((), device=ranks.device)
        guard = recipe.guard
        self.window = LossWindow(guard.spike_window, guard.spike_sigmas, ranks.device) if guard.spike != "off" else None
        self._hold_spikes = guard.spike in ("skip", "rewind")
        self.clock = LocalClock(ranks.device)
        if self.stage in (1, 2):
            self._watch_norm()
            keep_host_running(self.engine.optimizer)

    def update(self, batches: Iterable[MicroBatch], lr: float, ema_decay: float, votes: Votes = NO_VOTES) -> Tensor:
        """One optimizer step over `accumulation` micro-batches.

        A non-finite loss or gradient on any rank leaves weights, moments, EMA and batch-norm statistics as they were; so does
        a loss spike, unless `guard.spike` is `off` or `log`.

        Args:
            batches: exactly `accumulation` micro-batches of this rank.
            lr, ema_decay: of this step.
            votes: of this rank; they cost no exchange of their own.

        Returns:
            float32 [len(metric_names) + 3 + len(votes)] on the device: means over micro-batches and ranks, then the
            gradient's L2 norm before clipping, 1 if the step was applied, what the loss must not exceed (infinite without
            a limit), and the ranks' votes summed.
        """
        before = [buffer.clone() for buffer in self._batch_norm]
        total = torch.zeros(len(self.metric_names), device=self.device)
        for index, batch in enumerate(batches):
            losses = self._backward(batch)
            total += torch.stack([losses[name].detach().float() for name in self.metric_names])
            if index == self.accumulation - 1:
                shared = self._share(total / self.accumulation, votes)
            else:
                self.engine.step()
        measured, counted = shared.split([len(self.metric_names), len(votes)])
        loss, limit = measured[0], self._loss_limit()
        self._blocked = (~torch.isfinite(loss)).float()
        if self._hold_spikes:
            self._blocked = torch.maximum(self._blocked, (loss > limit).float())
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm = self._step()
        applied = 1 - self._blocked
        for buffer, old in zip(self._batch_norm, before, strict=True):
            buffer.copy_(torch.where(applied.bool(), buffer, old))
        if self.ema is not None:
            self.ema.update((1 - ema_decay) * applied)
        if self.window is not None:
            self.window.add(loss, applied)
        return torch.cat([measured, torch.stack([norm.float(), applied, limit]), counted])

    def _loss_limit(self) -> Tensor:
        if self.window is None:
            return torch.full((), torch.inf, device=self.device)
        return self.window.limit()

    def _backward(self, batch: Any) -> dict[str, Tensor]:
        """Run a micro-batch and back-propagate `loss`; returns the values of `metric_names`."""
        teacher_q: Projections | None = None
        if self._beside is not None:
            teacher_q = self._beside.start(batch.views, self.clock)
        elif self.teacher is not None:
            with self.clock:
                teacher_q = self.teacher(batch.views)
        with (
            self.clock if self.teacher is None else nullcontext()
        ):  # beside a teacher, batch norm waits for other ranks
            losses = self.engine(batch.views, batch.noise, teacher_q, batch.draws)
        self.engine.backward(losses["loss"])
        return losses

    def _share(self, metrics: Tensor, votes: Votes) -> Tensor:
        """Mean of the metrics over ranks, and the sums of their votes: one small all-reduce."""
        world = dist.get_world_size()
        cast = [
            torch.full((1,), float(vote), device=self.device) for vote in votes
        ]  # filled there: no copy to wait for
        shared = torch.cat([metrics / world, *cast])
        if world > 1:
            dist.all_reduce(shared)
        return shared

    def _step(self) -> Tensor:
        """Apply the gradients unless they are bad; returns their norm (0-dim)."""
        client = self.shards.client
        if self.stage == 0:
            gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self._blocked = torch.maximum(self._blocked, (~torch.isfinite(norm)).float())
        client.found_inf = self._blocked
        self.engine.step()
        if self.stage == 0:
            return norm
        if self.stage == 3 and self.engine.optimizer.overflow:
            self._blocked = torch.ones_like(self._blocked)
        found = self.engine.get_global_grad_norm()
        return torch.as_tensor(found if found is not None else float("nan"), dtype=torch.float32, device=self.device)

    def _watch_norm(self) -> None:
        """Let the global gradient norm that ZeRO 1/2 asks for before its update also hold the update back."""
        optimizer = self.engine.optimizer

        def watched() -> Tensor:
            norm = gradient_norm(optimizer)
            self._blocked = torch.maximum(self._blocked, norm.isinf().float())
            self.shards.client.found_inf = self._blocked
            return norm

        optimizer.scaled_global_norm = watched


def synchronise_batch_norm(module: nn.Module, world_size: int) -> None:
    """Let the heads' batch norms use statistics over all ranks (on CPU too, where torch's SyncBatchNorm refuses)."""
    for layer in module.modules():
        if isinstance(layer, HeadBatchNorm) and world_size > 1:
            layer.all_reduce_sum = dist_functional.all_reduce
            layer.world_size = world_size


def _keep_buffers(module: nn.Module, fp32: dict[str, Tensor]) -> None:
    """Undo any cast of buffers: position tables and running statistics stay in fp32."""
    for name, buffer in module.named_buffers():
        if buffer.dtype != fp32[name].dtype:
            buffer.data = fp32[name].to(buffer.device)


def split_batch(global_batch: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """Micro-batch of a rank and accumulation.

    Raises:
        UserError: the world size does not divide, or the micro-batch does not fit.
    """
    if global_batch % world_size:
        raise UserError(
            f"train.global_batch: {global_batch} is not divisible by {world_size} ranks; change one of them"
        )
    share = global_batch // world_size
    micro = min(micro_batch or share, share)
    if share % micro:
        raise UserError(
            f"train.micro_batch: {micro} does not divide the {share} images that each of {world_size} ranks sees of "
            f"train.global_batch {global_batch}; accumulation must be whole, e.g. train.micro_batch={_largest_divisor(share, micro)}"
        )
    return micro, share // micro


def check_batch_norm(recipe: Recipe, images: int) -> None:
    """Refuse batch norm over one image, whose variance is 0; `images`: of a micro-batch over all ranks."""
    method = recipe.method
    hidden = max(method.projector_depth, method.predictor_depth) > 1
    if method.name == "lut" and method.head_norm == "bn" and hidden and images < 2:
        raise UserError(
            "train.micro_batch: batch norm in the heads needs at least 2 images over all ranks, found 1; raise it, or set "
            "method.head_norm=ln"
        )


def _largest_divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, at_most + 1) if number % d == 0)
