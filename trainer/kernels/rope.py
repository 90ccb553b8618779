"""Two-dimensional RoPE of the vision tower. (The decoder's is megatron.core's.)"""

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10_000.0  # fixed in Qwen2.5-VL, no configuration names it


class Rotary(NamedTuple):
    """RoPE angles: channel d of a head is rotated together with channel d + D / 2. All float32, [P, D / 2]."""

    angles: Tensor
    cos: Tensor
    sin: Tensor


def rotary_2d(positions: Tensor, head_dim: int) -> Rotary:
    """Return the angles of patches at `positions` [P, 2] (row, column): half follow the row, half the column."""
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions.device) / (head_dim // 2)
    angles = (positions[:, :, None] * THETA**-exponents).flatten(1)
    return Rotary(angles, angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Return x [P, heads, D] rotated, computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
