"""Splitting query, key and value, the norms of query and key heads, and RoPE: one Triton kernel each way.

As separate operations, with the copies between them, they took 234 ms of a step of 3,853 of Qwen3-VL-4B; the kernels
take 65 (by the profiles of two H100s). Imported only where there is a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # tokens of a program


class NormedRope(torch.autograd.Function):
    """(qkv, weights of the query's and the key's norm, angles, eps) -> query, key, value.

    qkv [T, groups, heads a group + 2, D], the query heads of a group before its key and value; weights [D]; angles
    [T, D / 2] float32, channel d of a head is rotated together with channel d + D / 2. Query is [T, heads, D]; key and
    value are [T, groups, D]. RMSNorm over D of query and key heads, before RoPE; all of it in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, query_weight: Tensor, key_weight: Tensor, angles: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, groups, slots, width = qkv.shape
        query = qkv.new_empty(tokens, groups * (slots - 2), width)
        key, value = qkv.new_empty(2, tokens, groups, width)
        cos, sin = angles.cos(), angles.sin()
        _forward[_grid(qkv)](
            qkv, query_weight, key_weight, cos, sin, query, key, value, tokens, groups, slots, eps, **_blocks(width)
        )
        ctx.save_for_backward(qkv, query_weight, key_weight, angles)
        ctx.eps = eps
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        qkv, query_weight, key_weight, angles = ctx.saved_tensors
        tokens, groups, slots, width = qkv.shape
        query, key, value = (gradient.contiguous() for gradient in gradients)
        cos, sin = angles.cos(), angles.sin()
        out = torch.empty_like(qkv)
        blocks = triton.cdiv(tokens, ROWS)
        # Of each program that normalizes a head, a sum over its tokens. The values' heads have none.
        weights = torch.empty(blocks, groups, slots - 1, width, dtype=torch.float32, device=qkv.device)
        _backward[_grid(qkv)](
            qkv, query_weight, key_weight, cos, sin, query, key, value, out, weights, tokens, groups, slots, ctx.eps,
            **_blocks(width),
        )  # fmt: skip
        of_query, of_key = weights[:, :, :-1].sum((0, 1, 2)), weights[:, :, -1].sum((0, 1))
        return out, of_query.to(query_weight.dtype), of_key.to(key_weight.dtype), None, None


def _grid(qkv: Tensor) -> tuple[int, int]:
    tokens, groups, slots, _ = qkv.shape
    return triton.cdiv(tokens, ROWS), groups * slots


def _blocks(width: int) -> dict[str, int]:
    return {"half": width // 2, "lanes": triton.next_power_of_2(width // 2), "rows": ROWS, "num_warps": 4}


@triton.jit
def _load(start, inside, half):  # type: ignore[no-untyped-def]
    """Both halves of heads, in float32."""
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(start + half, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(start, first, second, inside, half):  # type: ignore[no-untyped-def]
    tl.store(start, first.to(start.dtype.element_ty), mask=inside)
    tl.store(start + half, second.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    qkv, query_weight, key_weight, cos, sin, query, key, value, tokens, groups, slots, eps,
    half: tl.constexpr, lanes: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    head, width = tl.program_id(1), 2 * half
    group, slot = head // slots, head % slots
    token = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    lane = tl.arange(0, lanes)[None, :]
    inside = (token < tokens) & (lane < half)
    first, second = _load(qkv + (token * groups * slots + head) * width + lane, inside, half)
    if slot == slots - 1:
        _store(value + (token * groups + group) * width + lane, first, second, inside, half)
    else:
        is_key = slot == slots - 2
        weight = key_weight if is_key else query_weight
        w_first, w_second = _load(weight + lane, lane < half, half)
        scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / width + eps)[:, None]
        first, second = first * scale * w_first, second * scale * w_second
        c = tl.load(cos + token * half + lane, mask=inside, other=0.0)
        s = tl.load(sin + token * half + lane, mask=inside, other=0.0)
        if is_key:
            out = key + (token * groups + group) * width + lane
        else:
            out = query + (token * groups * (slots - 2) + group * (slots - 2) + slot) * width + lane
        _store(out, first * c - second * s, second * c + first * s, inside, half)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    qkv, query_weight, key_weight, cos, sin, query, key, value, out, weights, tokens, groups, slots, eps,
    half: tl.constexpr, lanes: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """query, key, value: gradients of the outputs."""
    head, width = tl.program_id(1), 2 * half
    group, slot = head // slots, head % slots
    token = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    lane = tl.arange(0, lanes)[None, :]
    inside = (token < tokens) & (lane < half)
    place = (token * groups * slots + head) * width + lane
    if slot == slots - 1:
        d_first, d_second = _load(value + (token * groups + group) * width + lane, inside, half)
        _store(out + place, d_first, d_second, inside, half)
    else:
        is_key = slot == slots - 2
        if is_key:
            start = key + (token * groups + group) * width + lane
        else:
            start = query + (token * groups * (slots - 2) + group * (slots - 2) + slot) * width + lane
        d_first, d_second = _load(start, inside, half)
        c = tl.load(cos + token * half + lane, mask=inside, other=0.0)
        s = tl.load(sin + token * half + lane, mask=inside, other=0.0)
        d_first, d_second = d_first * c + d_second * s, d_second * c - d_first * s

        first, second = _load(qkv + place, inside, half)
        scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / width + eps)[:, None]
        first, second = first * scale, second * scale
        sums = weights + ((tl.program_id(0) * groups + group) * (slots - 1) + slot) * width + lane
        tl.store(sums, tl.sum(d_first * first, 0)[None, :], mask=lane < half)
        tl.store(sums + half, tl.sum(d_second * second, 0)[None, :], mask=lane < half)

        weight = key_weight if is_key else query_weight
        w_first, w_second = _load(weight + lane, lane < half, half)
        d_first, d_second = d_first * w_first, d_second * w_second
        along = (tl.sum(d_first * first + d_second * second, 1) / width)[:, None]
        _store(out + place, (d_first - first * along) * scale, (d_second - second * along) * scale, inside, half)
