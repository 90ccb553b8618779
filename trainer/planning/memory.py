"""Predicted peak memory of a GPU in training; within 3 % of what was measured (benchmarks/README.md)."""

from trainer.kernels.constants import CHUNK
from trainer.models.config import Compute, ModelConfig
from trainer.models.registry import costs_of

# What the allocator takes for activations beyond their bytes: blocks are rounded, and not every freed one fits again.
ROUNDING = 1.05


class MemoryModel:
    """Memory of one model's training step: weights, gradients, optimizer state, activations, logits."""

    def __init__(self, model: ModelConfig) -> None:
        self._model, self._costs = model, costs_of(model)

    def peak(self, *, tensor_parallel: int, data_parallel: int, tokens: int, patches: int, compute: Compute) -> float:
        """Return the bytes of a GPU for a micro-batch of `tokens` slots and `patches`.

        `data_parallel`: ranks that the optimizer's state is sharded over.
        """
        rounded = ROUNDING * (self._activations(tensor_parallel, tokens, compute) + self._vision(patches, compute))
        return self._state(tensor_parallel, data_parallel, compute) + rounded + self._logits(tensor_parallel, tokens)

    def _state(self, tensor_parallel: int, data_parallel: int, compute: Compute) -> float:
        # The vision tower is whole on every rank.
        parameters = self._costs.decoder_parameters / tensor_parallel + self._costs.vision_parameters
        # bfloat16 weights, float32 gradients; sharded over the ranks, two moments and the other half of master weights
        state = parameters * (2 + 4 + 6 / data_parallel)
        # In fp8 the layers' weights are cast in every forward pass, and kept in 8 bits for the backward pass.
        return state + compute.fp8 * (parameters - self._costs.embedding_parameters / tensor_parallel)

    def _activations(self, tensor_parallel: int, tokens: int, compute: Compute) -> float:
        h, layers, recomputed = self._model.hidden_size, self._model.num_layers, compute.recomputed_layers
        layer = self._costs.layer_bytes(compute) / tensor_parallel
        # A recomputed layer keeps its input; while one is recomputed, it holds as much as any other.
        kept = (layers - recomputed + (recomputed > 0)) * layer + recomputed * 2 * h / tensor_parallel
        return tokens * (kept + 8 * h)

    def _vision(self, patches: int, compute: Compute) -> float:
        return patches * self._costs.patch_bytes(compute)

    def _logits(self, tensor_parallel: int, tokens: int) -> float:
        # Logits, whose gradient takes their place: a chunk of them. Under tensor parallelism all of them, and the
        # gradient of the whole embedding.
        rows = min(tokens, CHUNK) if tensor_parallel == 1 else tokens + self._model.hidden_size
        return 2 * rows * self._model.vocab_size / tensor_parallel
