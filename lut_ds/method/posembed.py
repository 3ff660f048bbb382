"""Fixed sine-cosine position tables and their interpolation to another grid."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Positions = Literal["sincos_2d", "sinusoid_1d"]


def position_table(positions: Positions, width: int, grid: int) -> Tensor:
    """The table of a kind: float32 [1, 1 + grid*grid, D], a zero row for the cls token first."""
    return (sincos_position_table if positions == "sincos_2d" else sinusoid_position_table)(width, grid)


def sinusoid_position_table(width: int, grid: int) -> Tensor:
    """Position table over the raster index i, as in Beyond Masking: sin and cos of i * 10000^(-2k/D) interleaved.

    A zero row for the cls token, which that method has not, comes first. Unlike the 2-D table it has no meaning on another grid.

    Returns:
        float32 [1, 1 + grid*grid, D], computed in float64.
    """
    if width % 2:
        raise ValueError(f"width: expected a multiple of 2 for sinusoid positions, found {width}")
    with torch.device("cpu"):
        omega = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.arange(grid * grid, dtype=torch.float64)[:, None] * omega
        table = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
        return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).float().unsqueeze(0)


def sincos_position_table(width: int, grid: int) -> Tensor:
    """Position table of a square grid, a zero row for the cls token first.

    Channels are [sin(col*w), cos(col*w), sin(row*w), cos(row*w)] with w_k = 10000^(-k/(D/4)): the column comes first.
    Computed in float64 (MAE, He et al. 2022, appendix A.1).

    Args:
        width: D, a multiple of 4.
        grid: patches along a side.

    Returns:
        float32 [1, 1 + grid*grid, D].
    """
    if width % 4:
        raise ValueError(f"width: expected a multiple of 4 for sine-cosine positions, found {width}")
    # Positions must be real numbers even while a model is built on the meta device.
    with torch.device("cpu"):
        omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        row, col = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        angles = [position.reshape(-1, 1).double() * omega for position in (col, row)]
        table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
        return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).float().unsqueeze(0)


def interpolate_positions(table: Tensor, grid: int) -> Tensor:
    """Resample a position table [1, 1 + g*g, D] to [1, 1 + grid*grid, D]: bicubic, the cls row copied."""
    old = round((table.shape[1] - 1) ** 0.5)
    if old * old != table.shape[1] - 1:
        raise ValueError(f"table: expected 1 + g*g rows, found {table.shape[1]}")
    if old == grid:
        return table
    patches = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(table.dtype)
    return torch.cat([table[:, :1], patches], dim=1)
