"""What every analysis takes: a model with images, and a view of what goes on inside the model while it reads them.

Attention probabilities are computed here from the queries and keys that the layers compute, so no attention kernel has to
return them; their gradients follow from those of the layers' outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lut_ds.analysis.figures import Theme
from lut_ds.errors import UserError


@dataclass(frozen=True)
class Subject:
    """A model and the images that it is shown.

    Attributes:
        name: what figures call it.
        model: in eval mode; see `check_attention`.
        pixels: uint8 [N, S, S, 3], S the side that the model expects.
        labels: int64 [N], None where the images have none.
        normalise: uint8 [b, S, S, 3] -> float32 [b, 3, S, S], as the model expects pixels.
        features: normalised images [b, 3, S, S] -> one vector each [b, D], differentiable.
        batch_size: images a forward pass.
    """

    name: str
    model: VisionTransformer
    pixels: Tensor
    labels: Tensor | None
    normalise: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    batch_size: int = 64

    def batches(self) -> Iterator[Tensor]:
        """The images in order, normalised float32 [b, 3, S, S], on the model's device."""
        device = next(self.model.parameters()).device
        for part in self.pixels.split(self.batch_size):
            yield self.normalise(part.to(device))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.model.patch_embed.grid_size
        return rows, columns

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the cls token, registers."""
        return int(self.model.num_prefix_tokens)


@dataclass(frozen=True)
class Found:
    """What an analysis found out about a subject: `numbers` for JSON, and `arrays` that only its figure needs."""

    numbers: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


Drawing = Callable[[Theme, Sequence[tuple[str, Found]]], Figure]
"""Draws what was found about one or two subjects, by name, side by side."""


def check_attention(model: VisionTransformer, name: str) -> None:
    """UserError unless every block computes softmax attention in the layer that timm's VisionTransformer has by default."""
    for index, block in enumerate(model.blocks):
        layer = getattr(block, "attn", None)
        if not isinstance(layer, Attention):
            found = "none" if layer is None else type(layer).__name__
            raise UserError(
                f"checkpoint: {name}: expected timm's Attention in block {index}, found {found}; attention is analysed for "
                "plain ViTs alone: choose other analyses with --only"
            )


@dataclass(frozen=True)
class AttentionCall:
    """What an attention layer computed for a batch: its packed `qkv` [B, N, 3*H*d] and `output` [B, N, H*d] before projection."""

    layer: Attention
    qkv: Tensor
    output: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys as they are compared, and values: [B, H, N, d] each."""
        q, k, v = self.qkv.unflatten(2, (3, self.layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.layer.q_norm(q), self.layer.k_norm(k), v

    def probabilities(self) -> Tensor:
        """softmax(q k^T / sqrt(d)), float [B, H, N, N]; rows are queries."""
        q, k, _ = self.parts()
        return ((q * self.layer.scale) @ k.transpose(-1, -2)).softmax(dim=-1)

    def gradient(self, of_output: Tensor) -> Tensor:
        """The gradient of the probabilities [B, H, N, N], from that of `output` [B, N, H*d]: output = probabilities @ v."""
        grad = of_output.unflatten(2, (self.layer.num_heads, -1)).transpose(1, 2)
        return grad @ self.parts()[2].transpose(-1, -2)


@contextmanager
def watch_attention(model: VisionTransformer, visit: Callable[[int, AttentionCall], None]) -> Iterator[None]:
    """Inside, `visit` is called with the block's index whenever an attention layer ran; it changes nothing."""
    packed: dict[int, Tensor] = {}
    handles = []

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            packed[index] = output

        return hook

    def report(index: int, layer: Attention) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            visit(index, AttentionCall(layer, packed.pop(index), inputs[0]))

        return hook

    for index, block in enumerate(model.blocks):
        handles.append(block.attn.qkv.register_forward_hook(keep(index)))
        handles.append(block.attn.norm.register_forward_pre_hook(report(index, block.attn)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_tokens(model: VisionTransformer, visit: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, `visit` gets the tokens [B, N, D] that enter the first block (as 0) and that leave each (as 1 to depth)."""

    def entering(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        visit(0, inputs[0])

    def leaving(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            visit(index, output)

        return hook

    handles = [model.blocks[0].register_forward_pre_hook(entering)]
    handles += [block.register_forward_hook(leaving(index)) for index, block in enumerate(model.blocks, 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def all_features(subject: Subject) -> Tensor:
    """The feature of every image, float32 [N, D] on the CPU."""
    return torch.cat([subject.features(images).float().cpu() for images in subject.batches()])


def as_lists(values: Tensor | NDArray[Any]) -> Any:
    """Nested lists of floats with six significant digits, for JSON."""
    array = np.asarray(values, dtype=np.float64)
    return np.vectorize(lambda v: float(f"{v:.6g}"), otypes=[object])(array).tolist() if array.size else []
