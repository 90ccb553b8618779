"""Attention within the vision tower's windows of at most 8 x 8 patches, RoPE included: a kernel in Triton.

A window's queries, keys and values fit into one block's registers. So each pass reads the projection's output in place,
rotates it, attends and writes; nothing in between is in memory, and the backward pass needs no sums across blocks.
18,816 patches of 16 x 80 channels on an H100: forward 0.13 ms, backward 0.23 (floors by bytes 0.06 and 0.11); RoPE and
FlashAttention 2 take 0.32 and 0.80. Imported only on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 64  # patches of a window, 8 x 8 in Qwen's models


def window_attention(qkv: Tensor, cos: Tensor, sin: Tensor, cu_windows: Tensor, longest: int) -> Tensor:
    """Return softmax(R(Q) R(K)^T / sqrt(D)) V of each window, where R rotates as rope.rotate does: [P, heads, D].

    qkv [P, 3, heads, D], contiguous; cos and sin [P, D / 2] float32; cu_windows [windows + 1] int32, from 0 to P, where
    repeated entries are empty windows; no window has over `longest` patches, at most LARGEST. Sums are in float32;
    rotated queries and keys and probabilities are rounded to the input's dtype, as in FlashAttention.
    """
    out: Tensor = _WindowAttention.apply(qkv, cos, sin, cu_windows, longest)
    return out


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, cu_windows: Tensor, longest: int) -> Tensor:
        ctx.save_for_backward(qkv, cos, sin, cu_windows)
        ctx.longest = longest
        out = torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
        _launch(qkv, cos, sin, cu_windows, None, out, longest)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, cu_windows = ctx.saved_tensors
        out = torch.empty_like(qkv)
        _launch(qkv, cos, sin, cu_windows, gradient.contiguous(), out, ctx.longest)
        return out, None, None, None, None


def _launch(
    qkv: Tensor, cos: Tensor, sin: Tensor, cu_windows: Tensor, gradient: Tensor | None, out: Tensor, longest: int
) -> None:
    assert qkv.is_contiguous(), "the kernel takes no strides"
    heads, width = qkv.shape[2:]
    rows, lanes = (max(16, triton.next_power_of_2(size)) for size in (longest, width // 2))  # matrix units want 16
    # Heads first: neighbours in memory are read at about the same time.
    grid = (heads, len(cu_windows) - 1)
    sizes = width**-0.5, heads, width, rows, lanes
    _window_attention[grid](qkv, cos, sin, cu_windows, gradient, out, *sizes, num_warps=4)


@triton.jit
def _load(start, inside, half: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load both halves of the channels of one head's rows."""
    return tl.load(start, mask=inside, other=0.0), tl.load(start + half, mask=inside, other=0.0)


@triton.jit
def _store(start, first, second, inside, half: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(start, first.to(start.dtype.element_ty), mask=inside)
    tl.store(start + half, second.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(first, second, cos, sin):  # type: ignore[no-untyped-def]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _load_rotated(start, inside, cos, sin, half: tl.constexpr):  # type: ignore[no-untyped-def]
    first, second = _load(start, inside, half)
    dtype = first.dtype
    first, second = _rotate(first.to(tl.float32), second.to(tl.float32), cos, sin)
    return first.to(dtype), second.to(dtype)


@triton.jit
def _window_attention(  # type: ignore[no-untyped-def]
    qkv, cosines, sines, cu_windows, gradient, out, scale,
    heads: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """One head in one window. Without `gradient`, out is the attention's output; with it, the gradient of qkv."""
    head, window = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_windows + window)
    count = tl.load(cu_windows + window + 1) - begin
    if count > 0:
        half: tl.constexpr = width // 2
        stride: tl.constexpr = heads * width  # from queries to keys, and from keys to values
        row, lane = tl.arange(0, rows), tl.arange(0, lanes)
        real = row < count
        inside = real[:, None] & (lane < half)[None, :]
        patch = (begin + row).to(tl.int64)[:, None]
        angle = patch * half + lane[None, :]
        cos, sin = tl.load(cosines + angle, mask=inside, other=0.0), tl.load(sines + angle, mask=inside, other=0.0)
        offset = patch * (3 * stride) + head * width + lane[None, :]
        q1, q2 = _load_rotated(qkv + offset, inside, cos, sin, half)
        k1, k2 = _load_rotated(qkv + offset + stride, inside, cos, sin, half)
        v1, v2 = _load(qkv + offset + 2 * stride, inside, half)
        scores = (tl.dot(q1, tl.trans(k1)) + tl.dot(q2, tl.trans(k2))) * scale
        scores = tl.where(real[None, :], scores, -float("inf"))
        probabilities = tl.exp(scores - tl.max(scores, 1)[:, None])
        probabilities = probabilities / tl.sum(probabilities, 1)[:, None]
        attended = patch * stride + head * width + lane[None, :]
        if gradient is None:
            probabilities = probabilities.to(v1.dtype)
            _store(out + attended, tl.dot(probabilities, v1), tl.dot(probabilities, v2), inside, half)
        else:
            # Rows beyond the window have no gradient, so they add nothing below.
            g1, g2 = _load(gradient + attended, inside, half)
            score_gradients = tl.dot(g1, tl.trans(v1)) + tl.dot(g2, tl.trans(v2))
            score_gradients = (
                probabilities * (score_gradients - tl.sum(probabilities * score_gradients, 1)[:, None]) * scale
            ).to(v1.dtype)
            probabilities = tl.trans(probabilities.to(v1.dtype))
            _store(out + offset + 2 * stride, tl.dot(probabilities, g1), tl.dot(probabilities, g2), inside, half)
            # A second load: kept in registers, they make 124 bytes spill.
            cos, sin = tl.load(cosines + angle, mask=inside, other=0.0), tl.load(sines + angle, mask=inside, other=0.0)
            first, second = _rotate(
                tl.dot(score_gradients, k1), tl.dot(score_gradients, k2), cos, -sin
            )  # the inverse rotation
            _store(out + offset, first, second, inside, half)
            score_gradients = tl.trans(score_gradients)
            first, second = _rotate(tl.dot(score_gradients, q1), tl.dot(score_gradients, q2), cos, -sin)
            _store(out + offset + stride, first, second, inside, half)
