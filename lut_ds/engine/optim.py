"""AdamW parameter groups as the reference's, and an AdamW that a flag on the device can hold back."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to 1-D tensors and biases; cls and mask tokens are decayed (timm 0.4's rule)."""
    return parameter.dim() > 1 and not name.endswith(".bias")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups, decayed and not; frozen parameters are left out. Each group keeps its `names`."""
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[decays(name, parameter)].append((name, parameter))
    return [
        {
            "params": [p for _, p in members],
            "names": [n for n, _ in members],
            "weight_decay": weight_decay if decay else 0.0,
        }
        for decay, members in groups.items()
        if members
    ]


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that leaves weights, moments and its step count alone where `found_inf` is 1.

    The fused update reads the flag on the device, so a bad step costs no host synchronisation. Whoever knows about the
    gradients of all ranks sets `found_inf` (float32, 0-dim) before `step`.
    """

    found_inf: Tensor

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)


NOT_DECAYED = ("cls_token", "pos_embed")


def layer_of(name: str, depth: int) -> int:
    """The layer of a ViT's parameter for layer decay: 0 embeddings, i+1 block i, `depth`+1 what follows the blocks."""
    first, _, rest = name.partition(".")
    if first in ("cls_token", "pos_embed", "patch_embed"):
        return 0
    return int(rest.partition(".")[0]) + 1 if first == "blocks" else depth + 1


def layer_decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, layer_decay: float, depth: int, prefix: str = ""
) -> list[dict[str, Any]]:
    """AdamW groups of fine-tuning: a layer's learning rate is `lr_scale` = layer_decay^(depth+1-layer) times the schedule's.

    No weight decay on 1-D tensors, cls token and positions (BEiT's rule, as MAE and LUT fine-tune). Each group keeps its
    `names`; the order is by layer, decayed first. `prefix`: of the names of a ViT that is part of another module.
    """
    groups: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            within = name.removeprefix(prefix)
            plain = parameter.dim() == 1 or within in NOT_DECAYED
            groups.setdefault((layer_of(within, depth), plain), []).append((name, parameter))
    return [
        {
            "params": [p for _, p in members],
            "names": [n for n, _ in members],
            "weight_decay": 0.0 if plain else weight_decay,
            "lr_scale": layer_decay ** (depth + 1 - layer),
        }
        for (layer, plain), members in sorted(groups.items(), key=lambda group: group[0])
    ]
