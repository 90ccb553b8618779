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


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, labels, losses, rows, columns, gradient: tl.constexpr, block: tl.constexpr
):
    lanes = tl.arange(0, block)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = logits + tl.cast(row, tl.int64) * columns
        label = tl.load(labels + row)
        # Each lane has a separate maximum and sum: nothing is reduced before the end of the row.
        most = tl.full([block], -1e30, tl.float32)
        total = tl.zeros([block], tl.float32)
        for first in range(0, columns, block):
            x = tl.load(start + first + lanes, mask=first + lanes < columns, other=-float("inf")).to(tl.float32)
            smaller = tl.exp(-tl.abs(x - most))  # of the larger one: one exponential, not two
            total = tl.where(x > most, total * smaller + 1, total + smaller)
            most = tl.maximum(most, x)
        top = tl.max(most)
        total_of_row = tl.sum(total * tl.exp(most - top))
        trained = label != IGNORED
        target = tl.load(start + label, mask=trained, other=0.0).to(tl.float32)
        tl.store(losses + row, tl.where(trained, tl.log(total_of_row) + top - target, 0.0))
        if gradient:
            scale = tl.where(trained, 1 / total_of_row, 0.0)
            tl.debug_barrier()  # the target must have been read
            for first in range(0, columns, block):
                column = first + lanes
                x = tl.load(start + column, mask=column < columns, other=-float("inf")).to(tl.float32)
                score_gradient = tl.exp(x - top) * scale - tl.where(column == label, 1.0, 0.0)
                tl.store(start + column, score_gradient.to(logits.dtype.element_ty), mask=column < columns)
