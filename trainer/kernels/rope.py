"""Two-dimensional rotary embedding of the vision tower. (The language model's is megatron.core's own.)"""

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10_000.0  # fixed in Qwen2.5-VL, no configuration names it


class Rotary(NamedTuple):
    """By how much channels turn: channel d of a head together with channel d + head_dim / 2. All float32."""

    angles: Tensor  # [P, head_dim / 2]
    cos: Tensor
    sin: Tensor


def rotary_2d(positions: Tensor, head_dim: int) -> Rotary:
    """For patches at `positions` [P, 2] (row, column). Half of the pairs turn with the row, half with the column."""
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions.device) / (head_dim // 2)
    angles = (positions[:, :, None] * THETA**-exponents).flatten(1)
    return Rotary(angles, angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x [P, heads, head_dim], turned, computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
