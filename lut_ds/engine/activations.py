"""Bytes that a micro-batch takes beside the states: what autograd keeps for the backward pass, and what passes through.

Counted from the operators as they run, a block at a time; `tests/engine/test_activations.py` holds the kept bytes to what
autograd saves on a CPU. On a GPU the attention and loss kernels keep less than on a CPU, and what the compiler saves again
is not counted: an estimate from above.
"""

from dataclasses import dataclass

import torch
from lut_kernels.dispatch import choice

from lut_ds.config import Recipe
from lut_ds.engine.build import flops_shape

SIZES = {"fp32": 4, "bf16": 2, "fp8": 2}  # what passes from layer to layer beside fp8 products is bf16
INDEX = 8  # int64


@dataclass(frozen=True)
class Operators:
    """What decides how much an operator keeps.

    Attributes:
        element: bytes of a value of the forward pass.
        statistic: bytes of a mean or inverse deviation of a LayerNorm.
        kernels: whether the fused kernels of a GPU run, or plain operators on a CPU.
    """

    element: int
    statistic: int
    kernels: bool

    def fused_attention(self, tokens: int, head_dim: int) -> bool:
        """Whether attention keeps a value a row instead of the whole softmax."""
        dtype = torch.bfloat16 if self.element == 2 else torch.float32
        return self.kernels or choice("attention", "cpu", dtype, tokens, head_dim) != "plain"


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank.

    Attributes:
        kept: saved in the forward pass, there when the backward pass begins.
        backward: gradients and, with checkpointing, one recomputed block, beside `kept`.
        teacher: its forward pass, which is over when the student's begins.
        inputs: uint8 views, those of the micro-batches that are prepared ahead included, and mask noise; on a GPU also the
            copies of views that it computes from.
    """

    kept: float
    backward: float
    teacher: float
    inputs: float

    @property
    def peak(self) -> float:
        """The most at any one time."""
        return max(self.kept + self.backward, self.teacher) + self.inputs


def student_operators(recipe: Recipe, device: str) -> Operators:
    """Of the student's forward pass; device: `cuda` or `cpu`."""
    element = SIZES[recipe.precision.compute]
    return Operators(element, 4 if device == "cuda" else element, device == "cuda")


def activations(recipe: Recipe, images: int, world_size: int, device: str = "cuda") -> Activations:
    """What `images` of one micro-batch take on a rank; `device`: `cuda` or `cpu`."""
    m, method, shape, ops = recipe.model, recipe.method, flops_shape(recipe), student_operators(recipe, device)
    tokens, full = 1 + shape.kept, 1 + m.patches
    encoder = (shape.views * tokens, tokens, m.width, m.heads)
    decoder = (full, full, m.decoder_width, m.decoder_heads)
    blocks = {part: _block(*part, m.mlp_ratio, ops) for part in (encoder, decoder)}
    kept = _around_blocks(recipe, world_size > 1, ops)
    if recipe.train.activation_checkpointing:
        inputs = shape.views * tokens * m.width * m.depth + full * m.decoder_width * m.decoder_depth
        kept += inputs * ops.element
    else:
        kept += blocks[encoder] * m.depth + blocks[decoder] * m.decoder_depth
    # The gradients of the residual stream and of the MLP's two hidden tensors, of the larger kind of block.
    hidden = 2 + 2 * m.mlp_ratio
    backward = max(rows * width * hidden * ops.element for rows, _, width, _ in blocks)
    if recipe.train.activation_checkpointing:
        backward += max(blocks.values())
    pixels = method.views * recipe.view_side**2 * 3
    ahead = 1 + (recipe.data.prefetch or 2) + (device == "cuda")
    return Activations(
        images * kept, images * backward, images * _teacher(recipe), images * ahead * (pixels + 4 * m.patches)
    )


def with_checkpointing(recipe: Recipe, on: bool) -> Recipe:
    """The same recipe with or without activation checkpointing."""
    train = recipe.train.model_copy(update={"activation_checkpointing": on})
    return recipe.model_copy(update={"train": train})


def _block(rows: int, tokens: int, width: int, heads: int, mlp_ratio: float, ops: Operators) -> float:
    """A pre-norm block on an image: `rows` tokens in sequences of `tokens`.

    Both norms' inputs and outputs, q, k, v, the heads' output (8 widths), the MLP's hidden layer before and after GELU.
    """
    hidden = int(width * mlp_ratio)
    row = (8 * width + 2 * hidden) * ops.element + 4 * ops.statistic
    if ops.fused_attention(tokens, width // heads):
        return rows * (row + 4 * heads)  # log-sum-exp
    return rows * (row + heads * tokens * ops.element)  # softmax


def _around_blocks(recipe: Recipe, synchronised: bool, ops: Operators) -> float:
    """An image's bytes outside the blocks: patch rows, norms, indices, heads, prediction and loss."""
    m, shape, e = recipe.model, flops_shape(recipe), ops.element
    tokens, masked = 1 + shape.kept, m.patches - shape.kept
    predicted = masked if recipe.method.degradation == "none" else m.patches
    rows = shape.views * shape.kept * m.patch_dim * e
    norm = shape.views * tokens * (2 * m.width * e + 2 * ops.statistic)  # its output is the latent
    decoder = INDEX * (1 + m.patches + predicted)
    decoder += predicted * (2 * m.decoder_width * e + 2 * ops.statistic)
    fused_loss = ops.kernels and recipe.method.degradation == "none"
    decoder += predicted * m.patch_dim * (e if fused_loss else 8)  # the gradient; or prediction and target in fp32
    return rows + norm + decoder + (_heads(recipe, synchronised, e) if shape.views == 2 else 0.0)


def _heads(recipe: Recipe, synchronised: bool, e: int) -> float:
    """Projector and predictor, a feature a view. Batch norm works in fp32; over ranks it keeps two tensors."""
    method, width = recipe.method, recipe.model.width
    norm = {"bn": 8 if synchronised else 4, "ln": e, "none": 0}[method.head_norm]
    activation = e if method.head_act == "relu" else 2 * e
    layers = max(method.projector_depth - 1, 0) + max(method.predictor_depth - 1, 0)
    pooled, projected, compared = width * e, width * e, 2 * width * 4
    return method.views * (layers * method.head_hidden * (norm + activation) + pooled + projected + compared)


def _teacher(recipe: Recipe) -> float:
    """An image's bytes in the widest moment of the teacher's forward pass: the residual stream, its norm, the MLP's hidden
    layer before and after GELU; and the patch rows, twice while they are put together."""
    if recipe.method.name != "lut":
        return 0.0
    m, e = recipe.model, SIZES[recipe.precision.teacher]
    row = (2 + 2 * m.mlp_ratio) * m.width + 2 * m.patch_dim
    return recipe.method.views * (1 + m.patches) * row * e
