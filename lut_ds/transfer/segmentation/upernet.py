"""UPerNet on a plain ViT: a feature pyramid from four of its blocks, the decode head, and an auxiliary head.

Decode head: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, with the pyramid pooling of Zhao et
al., "Pyramid Scene Parsing Network", CVPR 2017. Pyramid and settings: BEiT (Bao et al., ICLR 2022), whose protocol MAE and LUT
follow on ADE20K.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from lut_kernels import FusedAttention
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lut_ds.config import Model
from lut_ds.method.heads import HeadBatchNorm
from lut_ds.method.linear import use_fast_linear
from lut_ds.transfer.droppath import share_drop_paths

STRIDES = (4, 8, 16, 32)  # of the pyramid's maps, pixels
POOLS = (1, 2, 3, 6)  # sides of the maps that the last one is pooled to


def pyramid_layers(depth: int) -> tuple[int, int, int, int]:
    """The blocks (from 0) whose outputs make the pyramid: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24, as BEiT's."""
    first, second, third = (max(0, round(share * depth) - 1) for share in (1 / 3, 1 / 2, 2 / 3))
    return first, second, third, depth - 1


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size], bilinear between pixel centres."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def region_means(maps: Tensor, side: int) -> Tensor:
    """[B, C, h, w] -> [B, C, side, side], means over the regions of adaptive average pooling.

    Two products, because torch's own pooling has no gradient on GPUs that repeats to the bit.
    """
    rows, columns = (_region_weights(size, side, maps.device) for size in maps.shape[2:])
    return (rows @ maps.float() @ columns.T).to(maps.dtype)


def _region_weights(size: int, side: int, device: torch.device) -> Tensor:
    """float32 [side, size]: region i is [floor(i * size / side), ceil((i + 1) * size / side))."""
    region, pixel = torch.arange(side, device=device)[:, None], torch.arange(size, device=device)
    inside = (pixel >= region * size // side) & (pixel * side < (region + 1) * size)
    return inside / inside.sum(dim=1, keepdim=True)


class PyramidViT(VisionTransformer):
    """A ViT whose output are the patch tokens after four of its blocks: [B, 3, S, S] -> four [B, D, S/P, S/P], not normalised.

    Args:
        sizes: of the ViT; S and P are `image_size` and `patch_size`.
        layers: the blocks, from 0, none before the one ahead of it; the last one is the last.
        drop_path: stochastic depth of the last block; it rises linearly from 0 at the first.
    """

    def __init__(self, sizes: Model, layers: Sequence[int], drop_path: float = 0.0) -> None:
        super().__init__(
            img_size=sizes.image_size,
            patch_size=sizes.patch_size,
            num_classes=0,
            global_pool="",
            embed_dim=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            mlp_ratio=sizes.mlp_ratio,
            drop_path_rate=drop_path,
            norm_layer=partial(LayerNorm, eps=1e-6),
            attn_layer=FusedAttention,
        )
        self.norm = nn.Identity()
        self.layers = list(layers)
        use_fast_linear(self)
        share_drop_paths(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """See the class."""
        distinct = sorted(set(self.layers))  # a shallow ViT gives some of its blocks twice
        maps = self.forward_intermediates(
            images, indices=distinct, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return [maps[distinct.index(layer)] for layer in self.layers]


class ConvNormAct(nn.Sequential):
    """Convolution without bias that keeps the size, batch norm over all ranks, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(convolution, HeadBatchNorm(outputs), nn.ReLU())


class Neck(nn.Module):
    """Four maps of one stride -> four maps of strides 4, 8, 16 and 32.

    With patches of 16: two deconvolutions, one, nothing, and a max pool (BEiT's), for 8 one step less, and so on.

    Args:
        width: D.
        patch: side of a patch, pixels; taken for the nearest power of two.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        side = round(math.log2(patch))
        self.steps = nn.ModuleList(_rescale(width, side - int(math.log2(stride))) for stride in STRIDES)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four [B, D, g, g], in the order of the blocks -> four [B, D, h, h], finest first."""
        return [step(one) for step, one in zip(self.steps, maps, strict=True)]


def _rescale(width: int, doublings: int) -> nn.Module:
    """A module that makes the sides 2^doublings times as long."""
    if doublings <= 0:
        return nn.Identity() if doublings == 0 else nn.MaxPool2d(2**-doublings)
    layers: list[nn.Module] = []
    for number in range(doublings):
        layers += [HeadBatchNorm(width), nn.GELU()] if number else []
        layers.append(nn.ConvTranspose2d(width, width, 2, 2))
    return nn.Sequential(*layers)


class PyramidPooling(nn.Module):
    """The map beside its means over 1, 2x2, 3x3 and 6x6 regions, merged: [B, D, h, w] -> [B, C, h, w] (PSPNet)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(ConvNormAct(inputs, outputs, 1) for _ in POOLS)
        self.merge = ConvNormAct(inputs + len(POOLS) * outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [stage(region_means(x, side)) for side, stage in zip(POOLS, self.stages, strict=True)]
        return self.merge(torch.cat([x, *(resized(one, x.shape[2:]) for one in pooled)], dim=1))


class UPerHead(nn.Module):
    """Four maps, finest first -> logits [B, classes, h, w] at the finest one's size.

    Args:
        width: D of the maps; channels: C inside (512 as published); classes; dropout: of the last map's channels.
    """

    def __init__(self, width: int, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        finer = len(STRIDES) - 1
        self.pooling = PyramidPooling(width, channels)
        self.laterals = nn.ModuleList(ConvNormAct(width, channels, 1) for _ in range(finer))
        self.smooth = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in range(finer))
        self.merge = ConvNormAct(len(STRIDES) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, D, h, h] of strides 4, 8, 16, 32 -> [B, classes, h, h] of stride 4."""
        level = self.pooling(maps[-1])
        levels = [level]
        for lateral, smooth, one in reversed(list(zip(self.laterals, self.smooth, maps[:-1], strict=True))):
            level = lateral(one) + resized(level, one.shape[2:])
            levels.insert(0, smooth(level))
        finest = levels[0].shape[2:]
        merged = self.merge(torch.cat([resized(one, finest) for one in levels], dim=1))
        return self.classifier(self.dropout(merged))


class FCNHead(nn.Module):
    """A convolution and a classifier on one map: logits that help to train the encoder (`auxiliary head`)."""

    def __init__(self, width: int, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.convolution = ConvNormAct(width, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, h, w] -> [B, classes, h, w]."""
        return self.classifier(self.dropout(self.convolution(x)))


def _classifier(channels: int, classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Segmenter(nn.Module):
    """An encoder with the neck and both heads.

    Args:
        encoder: gives the four maps.
        classes, channels, aux_channels, dropout: of the heads.
    """

    def __init__(
        self, encoder: PyramidViT, classes: int, channels: int = 512, aux_channels: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        width, patch = encoder.embed_dim, encoder.patch_embed.patch_size[0]
        self.encoder = encoder
        self.neck = Neck(width, patch)
        self.head = UPerHead(width, channels, classes, dropout)
        self.auxiliary = FCNHead(width, aux_channels, classes, dropout)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Normalised images [B, 3, S, S] -> logits [B, classes, h, h] at stride 4; in training also the auxiliary head's, at 16."""
        maps = self.neck(self.encoder(images))
        logits = self.head(maps)
        return (logits, self.auxiliary(maps[2])) if self.training else logits
