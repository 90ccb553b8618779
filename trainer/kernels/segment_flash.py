"""Attention within segments whose gradients have the same bits in every run: FlashAttention 2 as torch ships it.

cuDNN's backward pass, which is faster, adds up in any order. It has a deterministic one, but for packs on Hopper that
takes 128 bytes of workspace for each head and pair of tokens, as if each segment were as long as the pack:
Transformer Engine refuses it from 2^30 pairs on, and two packs of 8192 have 60 times as many. 1.5B: a step takes 22 %
longer in fp8.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def segment_flash(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, causal: bool) -> Tensor:
    """Return what kernels.attention.segment_attention does, [T, heads, D], for 16-bit numbers on a GPU, with no sync.

    query [T, heads, D]; key and value [T, groups, D]; cu_seqlens [segments + 1] int32, in which entries may repeat.
    """
    out: Tensor = _SegmentFlash.apply(query, key, value, cu_seqlens, causal)
    return out


class _SegmentFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        longest = len(query)  # an upper bound of every segment: the true one would need a sync
        out, sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, 0.0, causal, False
        )
        ctx.save_for_backward(query, key, value, out, sums, cu_seqlens, state, unused)
        ctx.causal = causal
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *saved, cu_seqlens, state, unused = ctx.saved_tensors
        longest = len(gradient)
        with _in_one_order():
            query, key, value = torch.ops.aten._flash_attention_backward(
                gradient, *saved, cu_seqlens, cu_seqlens, longest, longest, 0.0, ctx.causal, state, unused
            )
        return query, key, value, None, None


@contextmanager
def _in_one_order() -> Iterator[None]:
    """torch's switch for deterministic algorithms, without its filling of new memory; only this kernel asks for it."""
    settings: Any = torch.utils.deterministic
    before, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fills
