"""Token embeddings on a GPU. Their gradient goes straight into the weight's main_grad.

autograd would make a gradient of the whole table in each micro-batch, fill it with zeros and add it up: 0.6 GB and 2 ms
for the 151,936 rows of 3B, of which a pack of 8192 has a few thousand.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LookUp(torch.autograd.Function):
    """Return weight[ids]: [T, H]. No host sync, and the same sums in any run.

    ids [T] int64; weight [V, H], to whose `main_grad` (float32, as megatron.core's DDP makes it) the gradient is added.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight  # save_for_backward may return another object, without main_grad
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        (ids,) = ctx.saved_tensors
        add_rows(ctx.weight.main_grad, ids, gradient)
        return None, None


def add_rows(into: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add rows[i] to into[ids[i]] for each i, always in the same order. into [V, H] float32, ids [T], rows [T, H]."""
    ordered, order = ids.sort(stable=True)
    # Distinct tokens are numbered: row n of `sums` belongs to the n-th smallest, and left-over rows are zero.
    number = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
    sums = torch.ops.aten.embedding_dense_backward(
        rows, torch.empty_like(ids).scatter_(0, order, number), len(ids), -1, False
    )
    distinct = torch.zeros_like(ids).scatter_(0, number, ordered)
    into.index_add_(0, distinct, sums.to(into.dtype))
