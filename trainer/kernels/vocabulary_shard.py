"""Embedding and output head over tables of which each rank has some rows, and gradients of those rows alone.

As LookUp and LinearCrossEntropy, a chunk of tokens at a time: of every rank's, since each has the rows that the others
lack. On any device.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.kernels.constants import CHUNK, ELSEWHERE, IGNORED
from trainer.kernels.embedding import add_rows
from trainer.kernels.loss import add_weight_gradient


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's rows of a table, those of the vocabulary from `first` on."""

    first: int
    weight: Tensor  # [V / N, H]; of the last rank less, where N does not divide V
    gradient: Tensor  # the same in float32, which gradients are added to; empty if it does not train
    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def chunks(self, tokens: int) -> list[slice]:
        """Return slices of each rank's `tokens` that are CHUNK over all ranks."""
        size = max(CHUNK // self.ranks, 1)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] of each rank -> [N n, ...] of all."""
        whole = values.new_empty(self.ranks * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(whole, values.contiguous(), group=self.group)
        return whole

    def scatter_sum(self, values: Tensor) -> Tensor:
        """[N n, ...] of each rank -> this rank's [n, ...] of their sum."""
        part = values.new_empty(len(values) // self.ranks, *values.shape[1:])
        dist.reduce_scatter_tensor(part, values, group=self.group)
        return part

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of `ids` here, 0 where they are another rank's, and which are this rank's."""
        rows = ids - self.first
        here = (rows >= 0) & (rows < len(self.weight))
        return rows * here, here


class ShardedLookUp(torch.autograd.Function):
    """Return table[ids]: [T, H]. `parameter`: what autograd takes for the table; gradients go into `part`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, parameter: Tensor, part: VocabularyShard) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.part = part
        chunks = []
        for chunk in part.chunks(len(ids)):
            rows, here = part.local(part.gather(ids[chunk]))
            chunks.append(part.scatter_sum(part.weight[rows] * here[:, None]))  # all but one rank add zeros
        return torch.cat(chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,), part = ctx.saved_tensors, ctx.part
        for chunk in part.chunks(len(ids)):
            rows, here = part.local(part.gather(ids[chunk]))
            add_rows(part.gradient, rows, part.gather(gradient[chunk]) * here[:, None])
        return None, None, None


class ShardedCrossEntropy(torch.autograd.Function):
    """Return what LinearCrossEntropy does, with an output head of which `part` is this rank's.

    hidden [T, H]; `parameter`: what autograd takes for the head; labels [T] int64, IGNORED where not trained.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, parameter: Tensor, labels: Tensor, part: VocabularyShard, gradients: bool
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        to_hidden, to_weight = (gradients and needed for needed in ctx.needs_input_grad[:2])
        gradient = torch.empty_like(hidden) if to_hidden else None
        for chunk in part.chunks(len(hidden)):
            tokens, targets = part.gather(hidden[chunk]), part.gather(labels[chunk])
            rows, here = part.local(targets)
            targets = torch.where(here, rows, torch.where(targets == IGNORED, IGNORED, ELSEWHERE))
            logits = tokens @ part.weight.T  # [N n, V / N]; their gradient, from `scores_to_gradient_` on
            top, total, own = _combined(part.gather(statistics(logits, targets)[None]))
            found = torch.where(targets == IGNORED, 0.0, total.log() + top - own)
            losses[chunk] = found.view(part.ranks, -1)[part.rank]
            if to_hidden or to_weight:
                scores_to_gradient_(logits, targets, top, total)
            if gradient is not None:
                gradient[chunk] = part.scatter_sum(logits @ part.weight)
            if to_weight:
                add_weight_gradient(part.gradient, tokens, logits)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, unused: Any) -> tuple[Tensor | None, None, None, None, None]:
        """`scale` must be 1: the head's gradient has been added already."""
        (gradient,) = ctx.saved_tensors
        return gradient, None, None, None, None


def statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """Return of each row of `logits` [C, V] its maximum, the sum of its exponentials below that, and the target's.

    [3, C] float32. `targets` [C]: 0 is returned of ELSEWHERE and IGNORED.
    """
    if logits.is_cuda:
        from trainer.kernels.cross_entropy import row_statistics

        return row_statistics(logits, targets)
    scores = logits.float()
    top = scores.amax(1)
    own = scores.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    return torch.stack([top, (scores - top[:, None]).exp().sum(1), own])


def scores_to_gradient_(logits: Tensor, targets: Tensor, top: Tensor, total: Tensor) -> None:
    """Turn `logits` into the gradient of their cross entropy, given the statistics over the whole vocabulary."""
    if logits.is_cuda:
        from trainer.kernels.cross_entropy import scores_to_gradient_ as on_gpu

        on_gpu(logits, targets, top, total)
        return
    gradient = (logits.float() - top[:, None]).exp() / total[:, None]
    gradient[targets >= 0, targets[targets >= 0]] -= 1
    logits.copy_(gradient * (targets != IGNORED)[:, None])


def _combined(ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, 3, C], the statistics of each rank's columns -> those of all, [C] each."""
    tops, totals, own = ranks.unbind(1)
    top = tops.amax(0)
    return top, (totals * (tops - top).exp()).sum(0), own.sum(0)
