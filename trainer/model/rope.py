"""Two-dimensional rotary embedding of the vision tower. (The language model's is megatron.core's own.)"""

import torch
from torch import Tensor

THETA = 10_000.0  # fixed in Qwen2.5-VL, no configuration names it


def rotary_2d(positions: Tensor, head_dim: int) -> Tensor:
    """Angles [P, 1, head_dim] float32 for patches at `positions` [P, 2] (row, column).

    A quarter of the dimensions turns with the row, a quarter with the column, and the second half as the first.
    """
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions.device) / (head_dim // 2)
    angles = (positions[:, :, None] * THETA**-exponents).flatten(1)  # [P, 2, head_dim / 4] -> [P, head_dim / 2]
    return torch.cat((angles, angles), dim=-1)[:, None]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [P, heads, head_dim] turned by the angles, computed in float32."""
    first, second = x.chunk(2, dim=-1)
    return (x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()).to(x.dtype)
