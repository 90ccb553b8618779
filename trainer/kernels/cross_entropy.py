"""Cross entropy of logits and its gradient in one Triton kernel. Imported only where there is a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels import constants

IGNORED = tl.constexpr(constants.IGNORED)  # a kernel reads no other kind of global


def cross_entropy_(logits: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
    """Return the cross entropy of each row, [T] float32; with `gradient`, logits become d sum / d logits.

    logits [T, V], contiguous; labels [T] int64, -100 where not trained, and there it is 0. One block reads a row for
    its sum and once more for its gradient: 2.6 ms for 8192 x 151,936 in bfloat16 on an H100, which is 2.9 TB/s.
    Transformer Engine's pair of kernels takes 3.05 ms.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    programs = torch.cuda.get_device_properties(logits.device).multi_processor_count
    _cross_entropy[(programs,)](logits, labels, losses, rows, columns, gradient, 8192, num_warps=32)
    return losses


def row_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each row's maximum, its sum of exponentials below that, and its label's logit, 0 for labels below 0.

    logits [T, V], some columns of a vocabulary; labels [T] int64 -> [3, T] float32.
    """
    rows, columns = logits.shape
    statistics = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    _row_statistics[(rows,)](logits, labels, statistics, rows, columns, 8192, num_warps=32)
    return statistics


def scores_to_gradient_(logits: Tensor, labels: Tensor, top: Tensor, total: Tensor) -> None:
    """Turn `logits` into the gradient of the cross entropy, given maxima and sums [T] over the whole vocabulary."""
    rows, columns = logits.shape
    _scores_to_gradient[(rows,)](logits, labels, top, total, columns, 8192, num_warps=32)


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, labels, losses, rows, columns, gradient: tl.constexpr, block: tl.constexpr
):
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = logits + tl.cast(row, tl.int64) * columns
        label = tl.load(labels + row)
        top, total = _top_and_total(start, columns, block)
        trained = label != IGNORED
        target = tl.load(start + label, mask=trained, other=0.0).to(tl.float32)
        tl.store(losses + row, tl.where(trained, tl.log(total) + top - target, 0.0))
        if gradient:
            tl.debug_barrier()  # the target must have been read
            _to_gradient(start, columns, label, top, total, block)


@triton.jit
def _row_statistics(logits, labels, statistics, rows, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    start = logits + tl.cast(row, tl.int64) * columns
    label = tl.load(labels + row)
    top, total = _top_and_total(start, columns, block)
    tl.store(statistics + row, top)
    tl.store(statistics + rows + row, total)
    tl.store(statistics + 2 * rows + row, tl.load(start + label, mask=label >= 0, other=0.0).to(tl.float32))


@triton.jit
def _scores_to_gradient(logits, labels, tops, totals, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    start = logits + tl.cast(row, tl.int64) * columns
    _to_gradient(start, columns, tl.load(labels + row), tl.load(tops + row), tl.load(totals + row), block)


@triton.jit
def _top_and_total(start, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, block)
    # Each lane has a separate maximum and sum: nothing is reduced before the end of the row.
    most = tl.full([block], -1e30, tl.float32)
    total = tl.zeros([block], tl.float32)
    for first in range(0, columns, block):
        x = tl.load(start + first + lanes, mask=first + lanes < columns, other=-float("inf")).to(tl.float32)
        smaller = tl.exp(-tl.abs(x - most))  # of the larger one: one exponential, not two
        total = tl.where(x > most, total * smaller + 1, total + smaller)
        most = tl.maximum(most, x)
    top = tl.max(most)
    return top, tl.sum(total * tl.exp(most - top))


@triton.jit
def _to_gradient(start, columns, label, top, total, block: tl.constexpr):  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, block)
    scale = tl.where(label != IGNORED, 1 / total, 0.0)
    for first in range(0, columns, block):
        column = first + lanes
        x = tl.load(start + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - top) * scale - tl.where(column == label, 1.0, 0.0)
        tl.store(start + column, gradient.to(start.dtype.element_ty), mask=column < columns)
