"""Multi-head self-attention on the packed output of one qkv projection, for the short sequences of a ViT."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lut_kernels.attention_launch import launch_backward, launch_forward
from lut_kernels.checks import FLOATS, expect_dtype, expect_shape
from lut_kernels.dispatch import choice
from lut_kernels.runtime import INTERPRETED

# The backend the table names comes first; torch falls through to the next where it refuses the shape.
LIBRARY = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def _unpack(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q, k, v [B, H, N, d] of packed qkv."""
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def library_attention(qkv: torch.Tensor, num_heads: int, use: str) -> torch.Tensor:
    """The library side: one of `cudnn`, `flash`, `efficient`, `sdpa`, `plain`, as `choice` names them."""
    q, k, v = _unpack(qkv, num_heads)
    if use == "plain":
        with torch.autocast(qkv.device.type, enabled=False):  # autocast would widen the softmax and narrow it again
            weight = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
            return (weight @ v).transpose(1, 2).flatten(2)
    if use == "sdpa":
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    with sdpa_kernel(LIBRARY[use], set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _probabilities(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax weights, lse in base 2) in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    score = (q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).transpose(-1, -2)
    lse = torch.logsumexp(score, dim=-1)
    return torch.exp(score - lse[..., None]), lse / torch.log(lse.new_tensor(2.0))


@torch.library.custom_op("lut_kernels::attention", mutates_args=())
def attention_op(qkv: torch.Tensor, num_heads: int, save: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, N, H*d], lse [B, H, N] in base 2; lse is empty unless `save`)."""
    if INTERPRETED:
        return launch_forward(qkv, num_heads, save)
    q, k, v = _unpack(qkv, num_heads)
    weight, lse = _probabilities(q, k)
    out = (weight @ v.to(weight.dtype)).transpose(1, 2).flatten(2).to(qkv.dtype)
    return out, lse if save else lse.new_empty(0)


@torch.library.custom_op("lut_kernels::attention_backward", mutates_args=())
def attention_backward_op(
    grad: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Gradient of qkv [B, N, 3*H*d]."""
    if INTERPRETED:
        return launch_backward(grad, qkv, out, lse, num_heads)
    q, k, v = _unpack(qkv, num_heads)
    weight, _ = _probabilities(q, k)
    heads = (2, (num_heads, -1))
    g = grad.unflatten(*heads).transpose(1, 2).to(weight.dtype)
    delta = (grad.to(weight.dtype) * out.to(weight.dtype)).unflatten(*heads).sum(-1).transpose(1, 2)[..., None]
    grad_score = weight * (g @ v.to(weight.dtype).transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
    parts = (
        grad_score @ k.to(weight.dtype),
        grad_score.transpose(-1, -2) @ q.to(weight.dtype),
        weight.transpose(-1, -2) @ g,
    )
    return torch.stack(parts).permute(1, 3, 0, 2, 4).flatten(2).to(qkv.dtype)


attention_op.register_kernel("cuda")(launch_forward)
attention_backward_op.register_kernel("cuda")(launch_backward)


@attention_op.register_fake
def _(qkv: torch.Tensor, num_heads: int, save: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, packed = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty((batch, tokens, packed // 3)), qkv.new_empty(
        (batch, num_heads, tokens) if save else (0,), dtype=wide
    )


@attention_backward_op.register_fake
def _(grad: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, num_heads: int) -> torch.Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    qkv, num_heads, save = inputs
    if not save:
        raise ValueError("save: expected True where qkv requires a gradient, found False")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output)
    ctx.num_heads = num_heads


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    qkv, out, lse = ctx.saved_tensors
    return attention_backward_op(grad, qkv, out, lse, ctx.num_heads), None, None


attention_op.register_autograd(_backward, setup_context=_save)


def attention(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for every head, [B, N, H*d] in the dtype of qkv.

    qkv: float [B, N, 3*H*d], packed as (q, k, v) x heads x head dim. Without a gradient to take, nothing is saved.
    Raises ValueError or TypeError naming the argument at fault.
    """
    expect_dtype("qkv", qkv.dtype, FLOATS)
    expect_shape("qkv", qkv, (None, None, None))
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads) != 0:
        raise ValueError(f"num_heads: expected a divisor of {qkv.shape[2]} / 3 (the width of qkv), found {num_heads}")
    training = qkv.requires_grad and torch.is_grad_enabled()
    head_dim = qkv.shape[2] // (3 * num_heads)
    use = choice("attention", qkv.device, qkv.dtype, qkv.shape[1], head_dim, training=training)
    if use == "triton":
        return attention_op(qkv, num_heads, training)[0]
    return library_attention(qkv, num_heads, use)
