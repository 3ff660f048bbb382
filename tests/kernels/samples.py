"""Random inputs of the operators, and formulas written apart from the package to compare with."""

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def generator(seed: int) -> torch.Generator:
    """A generator of its own for every sample."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def random_pixels(batch: int, side: int, seed: int = 0) -> Tensor:
    """uint8 [B, S, S, 3]."""
    return torch.randint(0, 256, (batch, side, side, 3), generator=generator(seed), dtype=torch.uint8)


def random_ids(batch: int, patches: int, kept: int, seed: int = 0) -> Tensor:
    """int64 [B, K]: K different patches a sample, in shuffle order."""
    return torch.rand(batch, patches, generator=generator(seed)).argsort(dim=1)[:, :kept]


def normalised_chw(pixels: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] to float64 [B, 3, S, S]: (v/255 - mean)/std, the whole image."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    return ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, S, S] to [B, L, P*P*3], patches in raster order, (row, column, channel) inside; with plain slices."""
    side = images.shape[-1]
    rows = [
        images[:, :, top : top + patch_size, left : left + patch_size].permute(0, 2, 3, 1).flatten(1)
        for top in range(0, side, patch_size)
        for left in range(0, side, patch_size)
    ]
    return torch.stack(rows, dim=1)


def plain_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Head by head, from the definition."""
    width = qkv.shape[-1] // 3
    head_dim = width // num_heads
    outputs = []
    for head in range(num_heads):
        q, k, v = (qkv[..., part * width + head * head_dim :][..., :head_dim] for part in range(3))
        outputs.append(torch.softmax(q @ k.mT / head_dim**0.5, dim=-1) @ v)
    return torch.cat(outputs, dim=-1)


def plain_loss(pred: Tensor, pixels: Tensor, ids: Tensor, patch_size: int, norm_pix: bool) -> Tensor:
    """Target from the whole normalised image, in float64."""
    images = normalised_chw(pixels) if pixels.dtype == torch.uint8 else pixels.double()
    target = torch.stack([rows[chosen] for rows, chosen in zip(patchify(images, patch_size), ids)])
    if norm_pix:
        centred = target - target.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (target.shape[-1] - 1)
        target = centred / (variance + 1e-6).sqrt()
    return (pred.double() - target).square().mean(-1).mean()
