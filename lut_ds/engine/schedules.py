"""Learning rate and EMA decay as pure functions of progress; nothing here remembers a step."""

import math
from typing import Literal

import numpy as np


def peak_lr(blr: float, global_batch: int, rule: Literal["sqrt", "linear"], sqrt_divisor: float = 4.0) -> float:
    """Peak learning rate.

    Args:
        blr: base learning rate.
        global_batch: images an optimizer step.
        rule: `sqrt` blr*sqrt(batch)/sqrt_divisor (LUT's code: 4 in pre-training, 8 in fine-tuning); `linear` blr*batch/256.
    """
    return blr * math.sqrt(global_batch) / sqrt_divisor if rule == "sqrt" else blr * global_batch / 256


def lr_at(epoch: float, peak: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Learning rate at a fractional epoch: linear from 0, then a half cosine from `peak` to `min_lr`."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return min_lr + (peak - min_lr) * 0.5 * (
        1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs))
    )


def ema_decay_at(index: float, total: float, base: float, final: float = 1.0) -> float:
    """EMA decay: a half cosine from `base` at index 0 to `final` at index `total`."""
    return final + (base - final) * 0.5 * (1.0 + math.cos(math.pi * index / total))


def cosine_schedule(
    base: float, final: float, epochs: int, iters_per_epoch: int, warmup_epochs: int = 0, start: float = 0.0
) -> np.ndarray:
    """The whole table the reference builds: linspace warm-up including both ends, then a half cosine.

    Returns:
        float64 [epochs * iters_per_epoch].
    """
    warmup = np.linspace(start, base, warmup_epochs * iters_per_epoch) if warmup_epochs > 0 else np.empty(0)
    steps = np.arange(epochs * iters_per_epoch - len(warmup))
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps)))])
