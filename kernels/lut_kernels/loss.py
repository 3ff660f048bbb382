"""Reconstruction loss over the hidden patches; the target is built from the pixels, and never stored by the kernel."""

# mypy: disable-error-code=no-untyped-def
# (a jitted kernel has Triton's types, not Python's)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from lut_kernels.checks import FLOATS, expect_device, expect_dtype, expect_shape
from lut_kernels.dispatch import choice, tile
from lut_kernels.pixels import affine, check_ids, check_pixels, load_rows, normalised_rows
from lut_kernels.runtime import INTERPRETED, accumulator, batch_strided, launch

EPS = 1e-6


@triton.jit
def loss_kernel(
    pred,
    pixels,
    ids,
    row_loss,
    grad,
    image_stride,
    masked,
    row_blocks,
    grad_scale,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    SIDE: tl.constexpr,
    PATCH: tl.constexpr,
    HWC: tl.constexpr,
    NORM_PIX: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: ROWS patches of one image; pixels and prediction are read once, the gradient is written once."""
    program = tl.program_id(0)
    image = (program // row_blocks).to(tl.int64)
    rows = program % row_blocks * ROWS + tl.arange(0, ROWS)
    WIDTH: tl.constexpr = 3 * PATCH * PATCH
    value = tl.arange(0, BLOCK)
    mask = (rows < masked)[:, None] & (value < WIDTH)[None, :]
    target = load_rows(
        pixels, ids, image, image_stride, rows, masked,
        scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
        SIDE, PATCH, True, HWC, BLOCK, ACC,
    )  # fmt: skip
    if NORM_PIX:
        average = tl.sum(target, axis=1) / WIDTH
        target = tl.where(mask, target - average[:, None], 0.0)
        variance = tl.sum(target * target, axis=1) / (WIDTH - 1)
        target = target / tl.sqrt(variance + 1e-6)[:, None]
    offset = image * masked * WIDTH + rows[:, None] * WIDTH + value[None, :]
    error = tl.load(pred + offset, mask=mask, other=0).to(ACC) - target
    error = tl.where(mask, error, 0.0)
    tl.store(row_loss + image * masked + rows, tl.sum(error * error, axis=1) / WIDTH, mask=rows < masked)
    if WITH_GRAD:
        tl.store(grad + offset, (error * grad_scale).to(grad.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(grad, upstream, factor, size, BLOCK: tl.constexpr):
    """grad *= upstream * factor in place; where that product is 1, the usual case, nothing is read or written."""
    product = tl.load(upstream).to(tl.float32) * factor
    if product != 1.0:
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(grad + offset, mask=offset < size, other=0)
        scaled = value.to(tl.float32) * product
        tl.store(grad + offset, scaled.to(grad.dtype.element_ty), mask=offset < size)


def _stored_scale(pred: torch.Tensor) -> float:
    """What the saved gradient is multiplied by. fp16 would lose 2/numel to underflow, so it keeps the plain error."""
    return 1.0 if pred.dtype == torch.float16 else 2.0 / max(pred.numel(), 1)


def launch_loss(
    pred: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    norm_pix: bool,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, grid = check_pixels(pixels, patch_size)
    masked = ids.shape[1]
    pixels, pred = batch_strided(pixels), pred.contiguous()
    wide = torch.promote_types(pred.dtype, torch.float32)
    row_loss = pred.new_empty((batch, masked), dtype=wide)
    grad = torch.empty_like(pred) if with_grad else pred.new_empty(0)
    config = tile("reconstruction_loss", pred.device, pred.dtype)
    block = triton.next_power_of_2(pred.shape[2])
    rows = max(1, config["elements"] // block)
    row_blocks = triton.cdiv(masked, rows)
    if pred.numel() > 0:
        launch(
            loss_kernel, batch * row_blocks, pred,
            pred, pixels, ids.contiguous(), row_loss, grad, pixels.stride(0), masked, row_blocks,
            _stored_scale(pred), *scale, *shift,
            SIDE=grid * patch_size, PATCH=patch_size, HWC=pixels.dtype == torch.uint8, NORM_PIX=norm_pix,
            WITH_GRAD=with_grad, ROWS=rows, BLOCK=block,
            ACC=accumulator(torch.promote_types(pred.dtype, pixels.dtype)), num_warps=config["warps"],
        )  # fmt: skip
    return row_loss.mean().float(), grad


def launch_scale(grad: torch.Tensor, upstream: torch.Tensor, factor: float) -> None:
    block = 4096
    if grad.numel() > 0:
        launch(scale_kernel, triton.cdiv(grad.numel(), block), grad, grad, upstream, factor, grad.numel(), BLOCK=block)


def _target(
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    norm_pix: bool,
    wide: torch.dtype,
) -> torch.Tensor:
    target = normalised_rows(pixels, ids, patch_size, scale, shift).to(wide)
    if norm_pix:
        target = target - target.mean(dim=-1, keepdim=True)
        # not torch.var: on a CPU it takes twenty times as long as the norm
        var = torch.linalg.vector_norm(target, dim=-1, keepdim=True).square_() / (target.shape[-1] - 1)
        target.mul_((var + EPS).rsqrt_())
    return target


def _reference(
    pred: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    norm_pix: bool,
) -> torch.Tensor:
    wide = torch.promote_types(pred.dtype, torch.float32)
    with torch.no_grad():
        target = _target(pixels, ids, patch_size, scale, shift, norm_pix, wide)
    return torch.nn.functional.mse_loss(pred.to(wide), target).float()


@torch.library.custom_op("lut_kernels::reconstruction_loss", mutates_args=())
def loss_op(
    pred: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    norm_pix: bool,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, error * stored scale in the shape and dtype of pred; empty unless `with_grad`)."""
    if INTERPRETED:
        return launch_loss(pred, pixels, ids, patch_size, scale, shift, norm_pix, with_grad)
    wide = torch.promote_types(pred.dtype, torch.float32)
    error = pred.to(wide) - _target(pixels, ids, patch_size, scale, shift, norm_pix, wide)
    grad = (error * _stored_scale(pred)).to(pred.dtype) if with_grad else pred.new_empty(0)
    return error.square().mean().float(), grad


@torch.library.custom_op("lut_kernels::reconstruction_loss_scale", mutates_args={"grad"})
def scale_op(grad: torch.Tensor, upstream: torch.Tensor, factor: float) -> None:
    """Multiply the saved gradient in place by the gradient of the loss (a scalar on the device) and `factor`."""
    if INTERPRETED:
        launch_scale(grad, upstream, factor)
    else:
        grad.mul_((upstream * factor).to(torch.promote_types(grad.dtype, torch.float32)))


loss_op.register_kernel("cuda")(launch_loss)
scale_op.register_kernel("cuda")(launch_scale)


@loss_op.register_fake
def _(
    pred: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    norm_pix: bool,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad = torch.empty_like(pred, memory_format=torch.contiguous_format) if with_grad else pred.new_empty(0)
    return pred.new_empty((), dtype=torch.float32), grad


@scale_op.register_fake
def _(grad: torch.Tensor, upstream: torch.Tensor, factor: float) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    pred, with_grad = inputs[0], inputs[7]
    if not with_grad:
        raise ValueError("with_grad: expected True where pred requires a gradient, found False")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.factor = 2.0 / max(pred.numel(), 1) / _stored_scale(pred)


def _backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph: the saved gradient has no history, a second one would lack a part
        raise RuntimeError(
            'reconstruction_loss: the kernel has no second derivative (create_graph=True); use kernels_mode("torch")'
        )
    (grad,) = ctx.saved_tensors
    if type(grad) is not torch.Tensor:  # a tracer's stand-in: a compiled graph may not change what its forward saved
        return grad * (upstream * ctx.factor), None, None, None, None, None, None, None
    # In place: a copy would cost as much as the loss itself. A second backward through one forward is refused by
    # autograd (the saved tensor's version has moved); kernels_mode("torch") is the way out.
    scale_op(grad, upstream, ctx.factor)
    return grad, None, None, None, None, None, None, None


loss_op.register_autograd(_backward, setup_context=_save)


def reconstruction_loss(
    pred: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm_pix: bool = True,
) -> torch.Tensor:
    """fp32 scalar: the mean over B and M of each hidden patch's mean squared error (the loss of MAE and of LUT).

    pred: float [B, M, P*P*3]; pixels, patch_size, mean, std: as for `gather_patches`; ids: int64 [B, M], the patches
    predicted. norm_pix: the target of a patch is (row - its mean) / sqrt(its unbiased variance + 1e-6), over all its
    P*P*3 values, in fp32; else the row itself.
    The gradient flows to pred only. Raises ValueError, TypeError or IndexError naming the argument at fault. The values
    of ids are looked at on a CPU only: on a GPU an id out of range makes the loss NaN.
    """
    batch, grid = check_pixels(pixels, patch_size)
    check_ids(ids, batch, grid * grid, pixels)
    expect_dtype("pred", pred.dtype, FLOATS)
    expect_shape("pred", pred, (batch, ids.shape[1], patch_size * patch_size * 3))
    expect_device("pred", pred, "pixels", pixels)
    scale, shift = affine(pixels, mean, std)
    if choice("reconstruction_loss", pred.device, pred.dtype) == "triton":
        with_grad = pred.requires_grad and torch.is_grad_enabled()
        return loss_op(pred, pixels.detach(), ids, patch_size, scale, shift, norm_pix, with_grad)[0]
    return _reference(pred, pixels, ids, patch_size, scale, shift, norm_pix)
