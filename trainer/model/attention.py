"""Attention within segments of one long sequence: what makes a pack equal to its samples alone."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, *, causal: bool
) -> Tensor:
    """softmax(QK / sqrt(D)) V, where no token sees another segment.

    query [T, heads, D]; key and value [T, groups, D], groups divides heads; cu_seqlens [segments + 1] int32, from 0 to
    T, where repeated entries are empty segments; no segment is over `longest`. Returns [T, heads, D].
    """
    if query.is_cuda and query.dtype == torch.bfloat16:  # FlashAttention has no float32
        return _varlen(query, key, value, cu_seqlens, longest, causal)
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    grouped = key.shape[1] != query.shape[1]
    segments = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)))  # each [heads, length, D]
    out = [scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped) for q, k, v in segments]
    return torch.cat(out, dim=1).transpose(0, 1)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, causal: bool) -> Tensor:
    """FlashAttention 2 as torch ships it: one kernel, no host sync. It has no grouped heads of its own.

    It starts segments x heads x longest / 128 blocks, whatever the segments' lengths: for 294 windows of 64 patches in
    16 heads 4,704 if `longest` is 64, and 690,000, nearly all of them idle, if it is the 18,816 of the whole sequence.
    """
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, window_size=window)
    assert isinstance(out, Tensor)
    return out
