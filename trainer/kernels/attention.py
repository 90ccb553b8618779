"""Reference attention within the segments of one long sequence: it makes a pack equal to its samples alone."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def segment_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, causal: bool) -> Tensor:
    """Return softmax(Q K^T / sqrt(D)) V, where no token sees another segment: [T, heads, D].

    query [T, heads, D]; key and value [T, groups, D], groups divides heads; cu_seqlens [segments + 1] int32, from 0 to
    T, where repeated entries are empty segments.
    """
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    grouped = key.shape[1] != query.shape[1]
    segments = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)))  # each [heads, length, D]
    out = [scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped) for q, k, v in segments]
    return torch.cat(out, dim=1).transpose(0, 1)
