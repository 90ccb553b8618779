"""Differences of the norm and RoPE kernel from torch's operations, as JSON; run under TRITON_INTERPRET=1."""

import json

import torch
from torch import Tensor

from trainer.kernels.norm_rope import NormedRope

EPS = 1e-6


def reference(qkv: Tensor, query_weight: Tensor, key_weight: Tensor, angles: Tensor) -> tuple[Tensor, ...]:
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def rotated(heads: Tensor, weight: Tensor) -> Tensor:
        normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + EPS) * weight
        first, second = normed.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return rotated(qkv[:, :, :-2].flatten(1, 2), query_weight), rotated(qkv[:, :, -2], key_weight), qkv[:, :, -1]


def differences(tokens: int, groups: int, slots: int, width: int) -> list[float]:
    """Largest differences of the three outputs and of the three gradients, over the largest value."""
    torch.manual_seed(0)
    qkv = torch.randn(tokens, groups, slots, width, requires_grad=True)
    weights = [(1 + torch.randn(width) / 10).requires_grad_() for _ in range(2)]
    angles = 100 * torch.randn(tokens, width // 2)
    ours = NormedRope.apply(qkv, weights[0], weights[1], angles, EPS)
    right = reference(qkv, weights[0], weights[1], angles)
    upstream = [torch.randn_like(x) for x in right]
    pairs = [*zip(ours, right, strict=True)]
    gradients = (torch.autograd.grad(outputs, (qkv, *weights), upstream) for outputs in (ours, right))
    pairs += zip(*gradients, strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


if __name__ == "__main__":
    # A last block that is not full; heads of a width that is no power of two; one query head a group.
    print(json.dumps(differences(70, 2, 5, 48) + differences(32, 3, 3, 64)))
