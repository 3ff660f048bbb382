"""How strong a corruption is: the published constants by severity, for photographs and for small images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Pixels = NDArray[np.float32]
"""[S, S, 3], in [0, 1]."""

PHOTO, SMALL = 224, 32  # sides, pixels, that ImageNet-C's and CIFAR-10-C's constants were made for
_BETWEEN = (PHOTO * SMALL) ** 0.5


@dataclass(frozen=True)
class Level:
    """Severity 1..5 of a corruption of images of `side` pixels."""

    severity: int
    side: int

    @property
    def photo(self) -> bool:
        """ImageNet-C's constants, not CIFAR-10-C's: those whose side is nearer, in ratio."""
        return self.side > _BETWEEN

    def of(self, photo: Sequence[T], small: Sequence[T]) -> T:
        """This severity's entry of ImageNet-C's or CIFAR-10-C's table."""
        return (photo if self.photo else small)[self.severity - 1]

    def px(self, length: float) -> float:
        """A length of the table in pixels of this side: itself at 224 and at 32."""
        return length * self.side / (PHOTO if self.photo else SMALL)
