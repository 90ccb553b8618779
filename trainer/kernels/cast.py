"""Casting weights to fp8 with a scale that is known before. Imported only where there is a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def cast_to_e4m3(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write values * scale in e4m3, the largest one saturated, to `out`.

    values [n] bfloat16, out [n] uint8, both contiguous; scale: float32 of one element. 3 bytes an element, at 2.5 TB/s.
    """
    grid = (triton.cdiv(values.numel(), BLOCK),)
    _cast[grid](values, scale, out.view(torch.float8_e4m3fn), values.numel(), BLOCK, num_warps=8)


def fp8_transpose(values: Tensor, out: Tensor) -> None:
    """Write the transpose of values [rows, columns] to out [columns, rows]; both uint8, e4m3."""
    import transformer_engine.pytorch  # noqa: F401  # loads the library that the next one is a part of
    import transformer_engine_torch
    from transformer_engine.pytorch.constants import DType

    transformer_engine_torch.fp8_transpose(values, DType.kFloat8E4M3, out=out)


@triton.jit
def _cast(values, scale, out, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    x = tl.load(values + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(scale)
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    tl.store(out + at, x.to(tl.float8e4nv), mask=at < count)
