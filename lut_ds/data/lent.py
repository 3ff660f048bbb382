"""Images that DALI lends on a GPU, as tensors of torch's own memory."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


class OwnCopies:
    """Copies what is lent, and keeps the loan until the device has made the copies.

    DALI takes memory back when the host lets go of it, whatever torch's streams have queued on it, and decodes another batch
    into it. A training host lets go of a batch long before the device comes to it. Memory of torch's own is free again in
    the order of its streams.
    """

    def __init__(self) -> None:
        self._lent: deque[tuple[torch.cuda.Event, Sequence[Tensor]]] = deque()

    def take(self, lent: Sequence[Tensor]) -> list[Tensor]:
        """Equal tensors on the same CUDA device, as soon as its current stream comes to it; the host waits for nothing."""
        while self._lent and self._lent[0][0].query():
            self._lent.popleft()
        own = [tensor.clone() for tensor in lent]
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(lent[0].device))
        self._lent.append((copied, lent))
        return own

    def close(self) -> None:
        """Give everything back, once it is copied; may be called again."""
        while self._lent:
            self._lent[0][0].synchronize()
            self._lent.popleft()
