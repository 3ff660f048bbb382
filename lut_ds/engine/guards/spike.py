"""When a loss is a spike: a robust limit over the last applied steps, kept on the device so that no step waits for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

SIGMA = 1.4826  # of a normal distribution, over its median absolute deviation
LEAST_RISE = 0.05  # of the median: on a curve without noise any digit of rounding would be many sigmas


def loss_limit(losses: Tensor, sigmas: float) -> Tensor:
    """What the next loss must not exceed: median + max(sigmas * 1.4826 * MAD, 5 % of the median).

    Args:
        losses: float32 [n]; the limit is infinite while one of them is NaN.
        sigmas: allowed rise over the median, in robust standard deviations.

    Returns:
        float32, 0-dim.
    """
    median = losses.median()
    spread = (losses - median).abs().median()
    limit = median + torch.maximum(sigmas * SIGMA * spread, LEAST_RISE * median.abs())
    return torch.where(limit.isnan(), torch.inf, limit)


class LossWindow:
    """The losses of the last applied steps, and the limit that they set; nothing here is copied to the host.

    The losses are means over all ranks, and every operation on them is exact or rounds alike, so all ranks agree.

    Args:
        size: steps in the window; there is no limit before it is full.
        sigmas: see `loss_limit`.
        device: where the losses are.
    """

    def __init__(self, size: int, sigmas: float, device: torch.device) -> None:
        self._sigmas = sigmas
        self._losses = torch.full((size,), torch.nan, device=device)  # oldest first; NaN where there was no step yet

    def limit(self) -> Tensor:
        """float32, 0-dim: what the next step's loss must not exceed."""
        return loss_limit(self._losses, self._sigmas)

    def add(self, loss: Tensor, applied: Tensor) -> None:
        """Take in a step's loss (0-dim) if it was applied (0-dim, 1 or 0)."""
        moved = torch.cat([self._losses[1:], loss.reshape(1)])
        self._losses = torch.where(applied.bool(), moved, self._losses)

    def state(self) -> list[float]:
        """The losses, oldest first, for a checkpoint; waits for the device."""
        return [loss for loss in self._losses.tolist() if loss == loss]

    def load(self, losses: Sequence[float]) -> None:
        """Continue with the losses of a checkpoint."""
        size = len(self._losses)
        kept = list(losses)[-size:]
        filled = [float("nan")] * (size - len(kept)) + kept
        self._losses.copy_(torch.tensor(filled, dtype=torch.float32))
