"""The output head and its cross entropy on a GPU, a chunk of tokens at a time: logits never exist whole.

With 151,936 tokens in the vocabulary, the logits of four packs of 8192 are 10 GB, and their gradient as much again.
Here a chunk's logits become their gradient in place, which goes into the hidden states and the weight at once. All
in the forward pass: the gradient of a sum of losses is known there. The idea is Liger Kernel's fused linear cross
entropy (Hsu et al., 2024).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.kernels.constants import CHUNK


class LinearCrossEntropy(torch.autograd.Function):
    """Return the cross entropy of hidden @ weight.T: summed, a float32 scalar, and of each token, [T] without gradient.

    hidden [T, H]; weight [V, H], whose gradient is added to `weight.main_grad` (float32, as megatron.core's DDP makes
    it); labels [T] int64, IGNORED where not trained; gradients: whether there will be a backward pass, which autograd
    does not tell.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, gradients: bool) -> tuple[Tensor, Tensor]:
        from trainer.kernels.cross_entropy import cross_entropy_

        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        to_hidden, to_weight = (gradients and needed for needed in ctx.needs_input_grad[:2])
        gradient = torch.empty_like(hidden) if to_hidden else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = hidden[part] @ weight.T  # [chunk, V]; their gradient, from the next line on
            losses[part] = cross_entropy_(logits, labels[part], gradient=to_hidden or to_weight)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
            if to_weight:
                add_weight_gradient(weight.main_grad, hidden[part], logits)  # type: ignore[attr-defined]  # megatron's
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, unused: Any) -> tuple[Tensor | None, None, None, None]:
        """`scale` must be 1: the weight's gradient has been added already."""
        (gradient,) = ctx.saved_tensors
        return gradient, None, None, None


def add_weight_gradient(out: Tensor, hidden: Tensor, scores: Tensor) -> None:
    """Add scores.T @ hidden to `out`, float32, in the epilogue of the product."""
    if not out.is_cuda:
        out.addmm_(scores.T, hidden)
        return
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(hidden, scores, out_dtype=out.dtype, layout="NT", out=out, accumulate=True, grad=True)
