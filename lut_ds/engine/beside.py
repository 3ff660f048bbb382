"""The teacher's forward pass on a CUDA stream of its own, beside the student's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lut_ds.engine.guards.vitals import LocalClock

Wait = Callable[[], tuple[Tensor, ...]]


class BesideTeacher:
    """Starts the teacher's pass, and gives what waits for it.

    The caller's stream waits for the teacher where its projections are first read, so that small kernels of the student and
    the decoder fill what the teacher leaves idle. The two passes need their memory at once.

    Args:
        teacher: takes the views, gives one projection [b, D] a view; no gradient.
        device: a CUDA device.
    """

    def __init__(self, teacher: nn.Module, device: torch.device) -> None:
        self._teacher = teacher
        self._stream = torch.cuda.Stream(device)

    def start(self, views: Sequence[Tensor], clock: LocalClock) -> Wait:
        """Queue the pass after what the caller's stream was given so far; `clock` measures it on its own stream."""
        self._stream.wait_stream(torch.cuda.current_stream())  # views and refreshed weights
        with torch.cuda.stream(self._stream), clock:
            projections = self._teacher(views)
        for view in views:
            view.record_stream(self._stream)

        def wait() -> tuple[Tensor, ...]:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            for projection in projections:
                projection.record_stream(current)
            return tuple(projections)

        return wait
