"""Operators of masked-image pre-training: masked gather, token embedding, unshuffle, reconstruction loss, attention.

Importable without `lut_ds`, without a GPU and without a driver. Every operator has a plain-torch reference, which is
what runs on a CPU; `choice` tells which side would run, `kernels_mode` and the variable `LUT_KERNELS` force one.
"""

from lut_kernels.attention import attention
from lut_kernels.dispatch import OPS, choice, kernels_mode
from lut_kernels.embed import embed_tokens
from lut_kernels.gather import gather_patches
from lut_kernels.linear import linear
from lut_kernels.loss import reconstruction_loss
from lut_kernels.timm_attention import FusedAttention
from lut_kernels.unshuffle import unshuffle_tokens

__all__ = [
    "OPS",
    "FusedAttention",
    "attention",
    "choice",
    "embed_tokens",
    "gather_patches",
    "kernels_mode",
    "linear",
    "reconstruction_loss",
    "unshuffle_tokens",
]
