"""The embedding and the output head, of whose V rows each of the ranks that share a model's weights keeps V / N.

Weights are not gathered: a rank embeds, and scores, the tokens of all N ranks with its own rows, and the ranks exchange
activations. Those of a pack of 8192 are 59 MB in 7B, where a table is 1.1 GB and its gradient as much; and
the gradient of a row is complete where the row is. The work is the same: N times the tokens, one Nth of the rows.
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from trainer.kernels.vocabulary_shard import ShardedCrossEntropy, ShardedLookUp, VocabularyShard
from trainer.optim.shards import Owner, ShardGroups, Shards


class ShardedVocabulary(Shards):
    """Shards the embedding of `model` and its output head, where that is not the embedding itself.

    Every rank computes with as many tokens as the others.
    """

    def __init__(self, model: GPTModel, groups: ShardGroups, device: torch.device) -> None:
        owners: list[list[Owner]] = [[(model.embedding.word_embeddings, "weight")]]
        if not model.share_embeddings_and_output_weights:
            owners.append([(model.output_layer, "weight")])
        module, name = owners[0][0]
        vocabulary, width = module.get_parameter(name).shape
        super().__init__(owners, groups, device=device, alignment=width)
        first = self.rank * self.row.part // width
        rows = slice(max(vocabulary - first, 0))  # of the last rank; another one has fewer than these
        self._parts = [
            VocabularyShard(
                first, weights.view(-1, width)[rows], gradients.view(len(gradients) // width, width)[rows], self.group
            )
            for weights, gradients in zip(self.weights, self.gradients, strict=True)
        ]

    def row_name(self, row: int) -> str:
        return "output head" if row else "embedding"

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] -> embeddings [T, H]."""
        embeddings: Tensor = ShardedLookUp.apply(ids, self.weights[0], self._parts[0])
        return embeddings

    def cross_entropy(self, hidden_states: Tensor, labels: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what LinearCrossEntropy does, of the decoder's output [T, 1, H]; GPTModel's output processor."""
        arguments = hidden_states[:, 0], self.weights[-1], labels, self._parts[-1], torch.is_grad_enabled()
        losses: tuple[Tensor, Tensor] = ShardedCrossEntropy.apply(*arguments)
        return losses
