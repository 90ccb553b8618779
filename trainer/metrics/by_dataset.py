"""The loss of each dataset, summed on the device while the loss is computed: no host sync, static shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import torch
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.source import PackedData

MOST = 32  # datasets that are told apart, all others together being the last one
OTHER = "(other)"


@dataclass(frozen=True)
class Losses:
    """Means over trained tokens, and how many there are."""

    mean: float
    tokens: int
    by_dataset: dict[str, float]  # of those that have trained tokens
    tokens_by_dataset: dict[str, int]

    def figures(self) -> dict[str, Any]:
        """Return what StepMetrics has of them."""
        return {
            "loss": self.mean,
            "trained_tokens": self.tokens,
            "loss_by_dataset": self.by_dataset,
            "tokens_by_dataset": self.tokens_by_dataset,
        }


def told_apart(*data: PackedData | None) -> tuple[str, ...]:
    """Return the names of the datasets that have a separate sum: of too many, the first ones by name."""
    names = {name for packed in data if packed for name in packed.names}
    return tuple(sorted(names)[: MOST - 1])


class DatasetSums:
    """Sum of losses and number of trained tokens of each of N datasets, and of all others.

    `values` [2, N + 1] float32. Adding a micro-batch reads and writes [N + 1, T] numbers: at most 1 MB for T = 8192,
    whose logits are 2.5 GB.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = (*names, OTHER)
        self.values = torch.zeros(2, len(self._names), dtype=torch.float32, device=device)
        self._numbers = torch.arange(len(self._names), device=device)[:, None]

    def clear(self) -> None:
        self.values.zero_()

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Add a micro-batch; losses [T] float32, 0 where not trained."""
        of_dataset = batch.datasets == self._numbers  # [N + 1, T]
        # Chosen, not multiplied: a loss that is not finite stays with its dataset.
        chosen = [torch.where(of_dataset, values, 0.0).sum(1) for values in (losses, batch.loss_mask)]
        self.values += torch.stack(chosen)

    def trained(self) -> Tensor:
        """Return the number of trained tokens of all datasets, a new float32 scalar."""
        return self.values[1].sum()

    def losses(self, values: Sequence[float]) -> Losses:
        """Return what `values`, summed over the ranks and flattened, say. What follows them is ignored."""
        sums, counts = batched(values[: 2 * len(self._names)], len(self._names))
        seen = [(name, total, count) for name, total, count in zip(self._names, sums, counts, strict=True) if count]
        return Losses(
            mean=sum(sums) / max(sum(counts), 1),
            tokens=round(sum(counts)),
            by_dataset={name: total / count for name, total, count in seen},
            tokens_by_dataset={name: round(count) for name, _, count in seen},
        )
