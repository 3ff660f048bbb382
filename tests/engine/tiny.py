"""The tiny model and inputs that the engine tests share."""

from typing import Any

import torch
from torch import Tensor

from lut_ds.config import Recipe

STEPS = 20
LEARNING_RATES = [0.0] + [1e-3] * (STEPS - 1)
DECAYS = [0.9 + 0.004 * step for step in range(STEPS)]


def tiny_tree(**train: Any) -> dict[str, Any]:
    """Recipe tree of a LUT of a few thousand parameters: 16 px, 16 tokens, batch 16."""
    return {
        "model": {
            "image_size": 16,
            "patch_size": 4,
            "width": 32,
            "depth": 2,
            "heads": 2,
            "decoder_width": 16,
            "decoder_depth": 1,
            "decoder_heads": 2,
        },
        # GELU has no kink: with ReLU, rounding can open a unit on one side of a comparison and jump the gradient.
        "method": {"head_hidden": 24, "head_act": "gelu"},
        "optim": {"warmup_epochs": 1},
        "train": {"epochs": 4, "global_batch": 16, "compile": False, **train},
        "precision": {"compute": "fp32", "teacher": "fp32"},
    }


def pixels(recipe: Recipe, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two uint8 views [B, S, S, 3] and mask noise [B, L] of a step's global batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (recipe.train.global_batch, recipe.model.image_size, recipe.model.image_size, 3)
    # Smooth images: there is something to reconstruct.
    small = torch.rand((2, shape[0], 3, 4, 4), generator=generator)
    views = [torch.nn.functional.interpolate(s, shape[1:3], mode="bicubic").clamp(0, 1) for s in small]
    view1, view2 = ((v.permute(0, 2, 3, 1) * 255).to(torch.uint8).contiguous() for v in views)
    return view1, view2, torch.rand((shape[0], recipe.model.patches), generator=generator)
