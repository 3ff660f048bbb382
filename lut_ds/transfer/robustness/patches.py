"""Patches of the image's grid hidden or out of place (Naseer et al., "Intriguing Properties of Vision Transformers", 2021)."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

Batch = NDArray[np.uint8]
"""[b, S, S, 3]."""


def _order(patches: int, seed: int, sample: int, what: str) -> NDArray[np.int64]:
    return np.random.default_rng([seed, sample, zlib.crc32(what.encode())]).permutation(patches)


def random_orders(patches: int, seed: int, samples: Sequence[int]) -> NDArray[np.int64]:
    """Patches in the order in which they vanish, int64 [b, patches]: those hidden at one ratio are so at every higher one."""
    return np.stack([_order(patches, seed, sample, "occlusion") for sample in samples])


@torch.no_grad()
def salient_orders(model: VisionTransformer, images: Tensor) -> NDArray[np.int64]:
    """Patches by how much the cls token attends to them in the last block, the most first: int64 [b, patches].

    The published experiment takes a DINO model's attention for every model; this is the model's own.

    Args:
        images: normalised, float [b, 3, S, S].
    """
    inputs: list[Tensor] = []
    attention = model.blocks[-1].attn
    hook = attention.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    try:
        model.forward_features(images)
    finally:
        hook.remove()
    b, n, _ = inputs[0].shape
    q, k, _ = attention.qkv(inputs[0]).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores = (q[:, :, :1] @ k.transpose(-2, -1) * attention.scale).float().softmax(dim=-1)
    patches = scores.mean(dim=1)[:, 0, model.num_prefix_tokens :]
    return patches.argsort(dim=1, descending=True, stable=True).cpu().numpy()


def hide(pixels: Batch, orders: NDArray[np.int64], ratio: float, patch: int) -> Batch:
    """Black out the first `ratio` of each image's `orders` of patches of `patch` pixels (rounded to whole patches)."""
    cells = _cells(pixels, patch).copy()
    for cell, order in zip(cells, orders, strict=True):
        cell[order[: round(ratio * len(order))]] = 0
    return _image(cells, pixels.shape[1] // patch, patch)


def shuffle(pixels: Batch, grid: int, seed: int, samples: Sequence[int]) -> Batch:
    """Cut each image into grid x grid cells and put them in a random order."""
    side = pixels.shape[1] // grid
    cells = _cells(pixels, side)
    orders = [_order(grid * grid, seed, sample, f"shuffle {grid}") for sample in samples]
    return _image(np.stack([cell[order] for cell, order in zip(cells, orders, strict=True)]), grid, side)


def _cells(pixels: Batch, side: int) -> Batch:
    """[b, S, S, 3] -> [b, (S / side)^2, side, side, 3], row by row."""
    b, height, width, _ = pixels.shape
    cut = pixels.reshape(b, height // side, side, width // side, side, 3)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, side, side, 3)


def _image(cells: Batch, grid: int, side: int) -> Batch:
    joined = cells.reshape(len(cells), grid, grid, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return joined.reshape(len(cells), grid * side, grid * side, 3)
