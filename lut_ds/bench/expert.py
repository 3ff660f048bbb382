"""The baseline that an expert would write in plain PyTorch, to measure ours against: honest, and none of our parts in it.

timm's blocks with scaled_dot_product_attention, both views in one batch, autocast, fused AdamW, a foreach EMA, and
torch.compile where asked. It computes the same LUT or MAE step from images that are already normalised.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lut_ds.config import Recipe
from lut_ds.method.masking import keep_count


class Trunk(nn.Module):
    """A ViT encoder that drops hidden patches after the patch embedding, as MAE's published code does."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        m = recipe.model
        self.positions: Tensor
        self.embed = PatchEmbed(m.image_size, m.patch_size, 3, m.width)
        self.cls = nn.Parameter(torch.randn(1, 1, m.width) * 0.02)
        self.register_buffer("positions", torch.randn(1, 1 + m.patches, m.width) * 0.02)
        self.blocks = nn.Sequential(*[_block(m.width, m.heads, m.mlp_ratio) for _ in range(m.depth)])
        self.norm = nn.LayerNorm(m.width, eps=1e-6)

    def forward(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """[b, 3, S, S] and int64 [b, K] or None for all -> [b, 1+K, D]."""
        x = self.embed(images) + self.positions[:, 1:]
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        cls = (self.cls + self.positions[:, :1]).expand(len(x), -1, -1)
        return self.norm(self.blocks(torch.cat([cls, x], dim=1)))


class Student(nn.Module):
    """Encoder, decoder and heads; the loss of a step."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        m, method = recipe.model, recipe.method
        self.patch, self.kept, self.views = m.patch_size, keep_count(m.patches, method.mask_ratio), method.views
        self.w_bc = method.w_bc
        self.positions: Tensor
        self.trunk = Trunk(recipe)
        self.to_decoder = nn.Linear(m.width, m.decoder_width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, m.decoder_width) * 0.02)
        self.register_buffer("positions", torch.randn(1, 1 + m.patches, m.decoder_width) * 0.02)
        blocks = [_block(m.decoder_width, m.decoder_heads, m.mlp_ratio) for _ in range(m.decoder_depth)]
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(m.decoder_width, eps=1e-6))
        self.predict = nn.Linear(m.decoder_width, m.patch_dim)
        self.projector = _head(m.width, method.head_hidden)
        self.predictor = _head(m.width, method.head_hidden)

    def forward(self, images: Tensor, noise: Tensor, target: Tensor | None) -> Tensor:
        """Views in one batch [V*b, 3, S, S], mask noise [b, L], the teacher's [V*b, D] or None -> the loss."""
        order = noise.argsort(dim=1)
        kept = self.kept
        keep = torch.cat([order[:, v * kept : (v + 1) * kept] for v in range(self.views)])
        latent = self.trunk(images, keep)
        loss = self.reconstruct(latent[: len(noise)], images[: len(noise)], order)
        if target is None:
            return loss
        pooled = latent[:, 1:].mean(dim=1)
        first, second = (self.predictor(self.projector(z)) for z in pooled.chunk(2))
        t1, t2 = target.chunk(2)
        bc = 2 - F.cosine_similarity(second, t1).mean() - F.cosine_similarity(first, t2).mean()
        return loss + self.w_bc * bc

    def reconstruct(self, latent: Tensor, images: Tensor, order: Tensor) -> Tensor:
        """MAE's loss over the hidden patches, with per-patch normalised targets."""
        x = self.to_decoder(latent)
        hidden = order.shape[1] - self.kept
        tokens = torch.cat([x[:, 1:], self.mask_token.expand(len(x), hidden, -1).to(x.dtype)], dim=1)
        tokens = tokens.gather(1, order.argsort(dim=1)[..., None].expand(-1, -1, tokens.shape[-1]))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.positions
        predicted = self.predict(self.decoder(x)[:, 1:])
        wanted = order[:, self.kept :, None]
        patches = self.patchify(images)
        target = patches.gather(1, wanted.expand(-1, -1, patches.shape[-1]))
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return F.mse_loss(predicted.gather(1, wanted.expand(-1, -1, predicted.shape[-1])).float(), target)

    def patchify(self, images: Tensor) -> Tensor:
        """[b, 3, S, S] -> [b, L, P*P*3]."""
        p = self.patch
        x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Expert:
    """The training step.

    Args:
        recipe: a LUT or MAE recipe.
        device: to train on.
        compiled: torch.compile of student and teacher.
    """

    def __init__(self, recipe: Recipe, device: torch.device, compiled: bool) -> None:
        self.device, self.bf16 = device, recipe.precision.compute == "bf16"
        self.student = Student(recipe).to(device)
        two_views = recipe.method.views == 2
        self.teacher = copy.deepcopy(_teacher_of(self.student)).requires_grad_(False).eval() if two_views else None
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=1e-4, betas=recipe.optim.betas, weight_decay=0.05, fused=True
        )
        self.step_student: Any = torch.compile(self.student) if compiled else self.student
        self.step_teacher: Any = torch.compile(self._target) if compiled else self._target

    def step(self, images: Tensor, noise: Tensor) -> Tensor:
        """One update from normalised views [V*b, 3, S, S] and mask noise [b, L]; returns the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                target = self.step_teacher(images) if self.teacher is not None else None
            loss: Tensor = self.step_student(images, noise, target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.teacher is not None:
            with torch.no_grad():
                online = _teacher_of(self.student)
                torch._foreach_lerp_(list(self.teacher.parameters()), list(online.parameters()), 0.004)
                for average, buffer in zip(self.teacher.buffers(), online.buffers(), strict=True):
                    average.copy_(buffer)
        return loss.detach()

    def _target(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        trunk, projector = self.teacher
        features: Tensor = projector(trunk(images, None)[:, 1:].mean(dim=1))
        return features


def _teacher_of(student: Student) -> nn.ModuleList:
    return nn.ModuleList([student.trunk, student.projector])


def _block(width: int, heads: int, mlp_ratio: float) -> Block:
    return Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))


def _head(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width, bias=False)
    )
