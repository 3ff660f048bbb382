"""The operators as torch sees them: registration, gradients, tracing, checkpointing, determinism."""

from collections.abc import Callable
from typing import Any

import lut_kernels
import pytest
import torch
from lut_kernels import attention, embed_tokens, gather_patches, reconstruction_loss, unshuffle_tokens
from lut_kernels.attention import library_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.samples import MEAN, STD, randn, random_ids, random_pixels

OPS = torch.ops.lut_kernels
AFFINE = ([0.1, 0.2, 0.3], [-1.0, 0.0, 1.0])


def leaf(*shape: int, seed: int = 0) -> Tensor:
    """A float32 tensor that wants a gradient."""
    return randn(*shape, seed=seed, dtype=torch.float32).requires_grad_()


def op_samples() -> list[tuple[Any, tuple[Any, ...]]]:
    """Every registered operator with arguments, with and without gradients and optional arguments."""
    pixels, ids, restore = random_pixels(2, 12), random_ids(2, 9, 5), random_ids(2, 9, 9)
    pos, cls = leaf(1, 10, 8, seed=1), leaf(1, 1, 8, seed=2)
    return [
        (OPS.gather_patches, (pixels, ids, 4, *AFFINE, torch.float32)),
        (OPS.gather_patches, (pixels, None, 4, *AFFINE, torch.bfloat16)),
        (OPS.gather_patches, (randn(2, 3, 12, 12).float(), ids, 4, *AFFINE, torch.float16)),
        (OPS.embed_tokens, (leaf(2, 5, 8), cls, pos, ids)),
        (OPS.embed_tokens, (leaf(2, 9, 8), cls, pos.detach(), None)),
        (OPS.embed_tokens_backward_pos, (randn(2, 6, 8).float(), ids, 10)),
        (OPS.embed_tokens_backward_pos, (randn(2, 10, 8).bfloat16(), None, 10)),
        (OPS.unshuffle_tokens, (leaf(2, 4, 8), cls, pos, restore)),
        (OPS.unshuffle_tokens_backward, (randn(2, 10, 8).float(), restore, 4)),
        (OPS.reconstruction_loss, (leaf(2, 5, 48), pixels, ids, 4, *AFFINE, True, True)),
        (OPS.reconstruction_loss, (randn(2, 5, 48).half(), pixels, ids, 4, *AFFINE, False, False)),
        (OPS.reconstruction_loss_scale, (randn(2, 5, 48).float(), torch.tensor(0.5), 3.0)),
        (OPS.attention, (leaf(2, 7, 3 * 16), 2, True)),
        (OPS.attention, (randn(2, 7, 3 * 16).bfloat16(), 2, False)),
        (OPS.attention_backward, (randn(2, 7, 16), randn(2, 7, 48), randn(2, 7, 16), randn(2, 2, 7), 2)),
    ]


@pytest.mark.parametrize("op, arguments", op_samples(), ids=lambda value: getattr(value, "__name__", ""))
def test_opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op.default, arguments)


def differentiable() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Operators as functions of their differentiable arguments, in float64."""
    ids, restore = random_ids(2, 9, 5), random_ids(2, 9, 9)
    pos, cls = randn(1, 10, 3, seed=1), randn(1, 1, 3, seed=2)
    return {
        "embed_tokens": (lambda x, c, p: OPS.embed_tokens(x, c, p, ids), (randn(2, 5, 3), cls, pos)),
        "embed_tokens all": (lambda x, c, p: OPS.embed_tokens(x, c, p, None), (randn(2, 9, 3), cls, pos)),
        "unshuffle_tokens": (lambda x, m, p: OPS.unshuffle_tokens(x, m, p, restore), (randn(2, 4, 3), cls, pos)),
        "attention": (lambda qkv: OPS.attention(qkv, 2, True)[0], (randn(2, 5, 24),)),
        "reference embed_tokens": (lambda x, c, p: embed_tokens(x, c, p, ids), (randn(2, 5, 3), cls, pos)),
        "reference unshuffle_tokens": (lambda x, m, p: unshuffle_tokens(x, m, p, restore), (randn(2, 4, 3), cls, pos)),
        "reference attention": (lambda qkv: attention(qkv, 2), (randn(2, 5, 24),)),
        "reference gather_patches": (
            lambda images: gather_patches(images, ids, 2, dtype=torch.float64),
            (randn(2, 3, 6, 6),),
        ),
    }


@pytest.mark.parametrize("name", differentiable())
def test_gradcheck(name: str) -> None:
    function, arguments = differentiable()[name]
    assert torch.autograd.gradcheck(function, tuple(value.requires_grad_() for value in arguments))


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_loss_operator_gradient_equals_the_reference(norm_pix: bool, upstream: float) -> None:
    pixels, ids, pred = random_pixels(2, 12), random_ids(2, 9, 5), leaf(2, 5, 48)
    loss = OPS.reconstruction_loss(pred, pixels, ids, 4, [1 / 255] * 3, [0.0] * 3, norm_pix, True)[0]
    reference = reconstruction_loss(pred, pixels, ids, 4, norm_pix=norm_pix)
    torch.testing.assert_close(loss, reference)
    (gradient,) = torch.autograd.grad(loss * upstream, pred)
    assert not gradient.requires_grad  # it would keep the whole graph alive
    torch.testing.assert_close(gradient, torch.autograd.grad(reference * upstream, pred)[0])


def test_loss_operator_keeps_small_fp16_gradients() -> None:
    pixels, ids = random_pixels(2, 64), random_ids(2, 256, 200)
    pred = torch.full((2, 200, 48), 1e-3, dtype=torch.float16, requires_grad=True)
    loss = OPS.reconstruction_loss(pred, pixels, ids, 4, [1 / 255] * 3, [0.0] * 3, True, True)[0]
    (gradient,) = torch.autograd.grad(loss * 2.0**14, pred)
    wide = pred.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reconstruction_loss(wide, pixels, ids, 4) * 2.0**14, wide)
    assert (gradient.double() - expected).norm() / expected.norm() < 2e-3


def test_second_backward_through_the_loss_operator_is_refused_not_wrong() -> None:
    pixels, ids, pred = random_pixels(1, 8), random_ids(1, 4, 2), leaf(1, 2, 48)
    loss = OPS.reconstruction_loss(pred, pixels, ids, 4, *AFFINE, True, True)[0]
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss * 2).backward()


def test_second_derivatives_are_refused_not_wrong() -> None:
    x, cls, pos = leaf(1, 4, 8), leaf(1, 1, 8, seed=1), leaf(1, 10, 8, seed=2)
    pixels, ids, pred = random_pixels(1, 8), random_ids(1, 4, 2), leaf(1, 2, 48)

    def twice(out: Tensor, of: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(out.square().sum(), of, create_graph=True)
        return torch.autograd.grad((first * of).sum(), of)[0]

    for out, of in (
        (OPS.reconstruction_loss(pred, pixels, ids, 4, *AFFINE, True, True)[0], pred),
        (OPS.attention(x @ torch.ones(8, 24), 2, True)[0], x),
        (OPS.unshuffle_tokens(x, cls, pos, random_ids(1, 9, 9)), x),
    ):
        with pytest.raises(RuntimeError, match=r"no second derivative \(create_graph=True\)|no autograd formula"):
            twice(out, of)
    ids = random_ids(1, 9, 4)
    one, other = (twice(side(x, cls, pos, ids), x) for side in (OPS.embed_tokens, embed_tokens))
    torch.testing.assert_close(one, other)  # linear, and its backward is made of torch's own operators
    reference = reconstruction_loss(pred, pixels, random_ids(1, 4, 2), 4)
    assert twice(reference, pred).abs().sum() > 0


def step(pixels: Tensor, ids: Tensor, restore: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """All operators in the order of a training step, through the public functions."""
    rows = gather_patches(pixels, ids, 4, MEAN, STD)
    tokens = embed_tokens(rows @ weights["patch"], weights["cls"], weights["pos"], ids)
    tokens = tokens + attention(tokens @ weights["qkv"], 2)
    full = unshuffle_tokens(tokens, weights["mask"], weights["decoder_pos"], restore)
    return reconstruction_loss(full[:, 1:5] @ weights["out"], pixels, ids[:, :4], 4, MEAN, STD)


def step_arguments() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """A tiny model."""
    shapes = {
        "patch": (48, 8), "cls": (1, 1, 8), "pos": (1, 10, 8), "qkv": (8, 24), "mask": (1, 1, 8),
        "decoder_pos": (1, 10, 8), "out": (8, 48),
    }  # fmt: skip
    # small, or scores in the hundreds turn rounding into differences
    weights = {
        name: (randn(*shape, seed=index).float() * 0.1).requires_grad_()
        for index, (name, shape) in enumerate(shapes.items())
    }
    shuffle = random_ids(2, 9, 9)
    return random_pixels(2, 12), shuffle[:, :4], shuffle.argsort(1), weights


def op_step(pixels: Tensor, ids: Tensor, restore: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The same step through the registered operators, as on a device that takes the kernels."""
    scale, shift = [1 / (255 * s) for s in STD], [-m / s for m, s in zip(MEAN, STD)]
    rows = OPS.gather_patches(pixels, ids, 4, scale, shift, torch.float32)
    tokens = OPS.embed_tokens(rows @ weights["patch"], weights["cls"], weights["pos"], ids)
    tokens = tokens + OPS.attention(tokens @ weights["qkv"], 2, True)[0]
    full = OPS.unshuffle_tokens(tokens, weights["mask"], weights["decoder_pos"], restore)
    pred = full[:, 1:5] @ weights["out"]
    return OPS.reconstruction_loss(pred, pixels, ids[:, :4], 4, scale, shift, True, True)[0]


def value_and_gradients(function: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradient of every weight, with an upstream gradient that is not one."""
    loss = function(*arguments)
    return loss, list(torch.autograd.grad(loss * 0.5, list(arguments[-1].values())))


def assert_same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("function", [step, op_step])
def test_compile_without_a_graph_break(function: Callable[..., Tensor], backend: str) -> None:
    torch._dynamo.reset()
    arguments = step_arguments()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_same(value_and_gradients(compiled, *arguments), value_and_gradients(step, *arguments))


@pytest.mark.parametrize("use", ["sdpa", "plain", "cudnn", "flash", "efficient"])
def test_library_sides_of_attention_agree_and_compile(use: str) -> None:
    torch._dynamo.reset()
    qkv = randn(2, 9, 48).requires_grad_()
    upstream = randn(2, 9, 16, seed=1)
    compiled = torch.compile(library_attention, fullgraph=True, backend="aot_eager")
    for side in (library_attention, compiled):
        out = side(qkv, 2, use)
        expected = attention(qkv, 2)
        torch.testing.assert_close(out, expected)
        gradients = [torch.autograd.grad(value, qkv, upstream)[0] for value in (out, expected)]
        torch.testing.assert_close(*gradients)


def test_compiled_code_follows_the_mode() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    qkv = leaf(1, 5, 24)
    compiled(qkv, 2)
    with lut_kernels.kernels_mode("triton"), pytest.raises(Exception, match="TRITON_INTERPRET=1; found triton"):
        compiled(qkv, 2)
    torch.testing.assert_close(compiled(qkv, 2), attention(qkv, 2))


@pytest.mark.parametrize("function", [step, op_step])
def test_inside_activation_checkpointing(function: Callable[..., Tensor]) -> None:
    arguments = step_arguments()

    def recomputed(*inner: Any) -> Tensor:
        return checkpoint(function, *inner, use_reentrant=False)

    assert_same(value_and_gradients(recomputed, *arguments), value_and_gradients(step, *arguments))


def test_without_gradients() -> None:
    arguments = step_arguments()
    expected = step(*arguments)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = step(*arguments)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected.detach())


def test_same_inputs_same_bits() -> None:
    first, second = (value_and_gradients(step, *step_arguments()) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1]))
