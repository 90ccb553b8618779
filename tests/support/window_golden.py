"""Attention in windows by the kernel, beside the reference in float32."""

import json

import torch
from torch import Tensor

from trainer.kernels.rope import rotary_2d
from trainer.models.qwen2_5.vision_layers import ReferenceVisionLayers


def differences(windows: list[int], longest: int, heads: int, width: int, like: Tensor) -> list[float]:
    """Relative: of what is attended, and of the gradients of query, key and value. `like`: device and precision."""
    from trainer.kernels.window_attention import window_attention

    torch.manual_seed(0)
    patches = sum(windows)
    qkv = torch.randn(patches, 3, heads, width).to(like).requires_grad_()
    gradient = torch.randn(patches, heads, width).to(like)
    rotary = rotary_2d(torch.randint(0, 600, (patches, 2), device=like.device), width)
    ends = torch.tensor([0, *windows], device=like.device).cumsum(0).int()
    found = window_attention(qkv, rotary.cos, rotary.sin, ends, longest)
    exact = qkv.detach().float().requires_grad_()
    expected = ReferenceVisionLayers().attend(exact, rotary, ends, longest)
    (gradients,) = torch.autograd.grad(found, qkv, gradient)
    (expected_gradients,) = torch.autograd.grad(expected, exact, gradient.float())
    pairs = [(found, expected), *zip(gradients.unbind(1), expected_gradients.unbind(1))]
    return [((a.float() - b).norm() / b.norm()).item() for a, b in pairs]


if __name__ == "__main__":
    float32 = torch.empty(0)
    print(
        json.dumps(differences([64, 48, 1, 5, 0, 0], 64, 2, 80, float32) + differences([16, 4, 0], 16, 3, 32, float32))
    )
