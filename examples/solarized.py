"""A degradation of one's own, in one file that is part of no package.

    lut-ds pretrain beyond_distorted data.path=DIR method.degradation=examples/solarized.py:Solarized
    lut-ds data show beyond_distorted data.path=DIR method.degradation=examples/solarized.py:Solarized -o sheet.png

It goes with masks (`method.mask_ratio=0.75`) and with LUT's teacher (`method.name=lut`) like any other. It is tried on two
images before a run begins, and every rank needs the same file. Fields with defaults are parameters:
`method.degradation_params.lowest=0.5`. What the loss is and where it counts are inherited;
`lut_ds/method/degradations/base.py` has all that can be changed, `zoomed_in.py` changes all.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lut_ds.method.degradations import Degradation


@dataclass(frozen=True)
class Solarized(Degradation):
    """Inverts what is brighter than a random level; the target is the view as it was, at all patches."""

    lowest: float = 0.0
    draws: ClassVar[int] = 1

    def degrade(self, view: Tensor, draws: Tensor, side: int) -> Tensor:
        """Levels lie in [lowest, lowest + 1), in standard deviations of a channel above its mean."""
        level = self.lowest + draws[:, :, None, None]
        return torch.where(view > level, -view, view)
