"""Predicted peak memory of a GPU in training; within 3 % of what was measured (benchmarks/README.md).

Sharded weights were measured on two GPUs alone; their formula is by the buffers of trainer/optim.
"""

from trainer.kernels.constants import CHUNK
from trainer.models.config import Compute, ModelConfig
from trainer.models.registry import costs_of
from trainer.planning.gpus import NODE

# What the allocator takes for activations beyond their bytes: blocks are rounded, and not every freed one fits again.
ROUNDING = 1.05
# Bytes of a parameter: bfloat16 weight, float32 gradient; two moments and the other half of the master weight.
WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 6
# Of a sharded layer's parameter, while the layer is at work and the next is on its way. Weights: both as they are
# gathered, in bfloat16 or fp8, in fp8 also one transposed for the backward pass. Gradients: both in bfloat16.
WORKING_WEIGHT, WORKING_WEIGHT_FP8, WORKING_GRADIENT = 2 + 2, 1 + 1 + 1, 2 + 2
# Of a sharded parameter in fp8: what other ranks read. And of a rank's part of one layer: its gradient as received.
PUBLISHED, RECEIVED = 1, 2


class MemoryModel:
    """Memory of one model's training step: weights, gradients, optimizer state, activations, logits."""

    def __init__(self, model: ModelConfig) -> None:
        self._model, self._costs = model, costs_of(model)

    def peak(
        self,
        *,
        tensor_parallel: int,
        data_parallel: int,
        tokens: int,
        patches: int,
        compute: Compute,
        weight_shards: int = 1,
        node: int = NODE,
    ) -> float:
        """Return the bytes of a GPU for a micro-batch of `tokens` slots and `patches`.

        `data_parallel`: ranks that the optimizer's state is sharded over. `weight_shards` > 1: weights, gradients and
        optimizer state of the decoder's layers are sharded over that many ranks, those of embedding and output head
        over as many of them as a `node` has.
        """
        if weight_shards > 1:
            state = self._sharded_state(weight_shards, node, data_parallel, compute)
            logits = self._sharded_logits(min(weight_shards, node))
        else:
            state = self._state(tensor_parallel, data_parallel, compute)
            logits = self._logits(tensor_parallel, tokens)
        rounded = ROUNDING * (self._activations(tensor_parallel, tokens, compute) + self._vision(patches, compute))
        return state + rounded + logits

    def _sharded_state(self, shards: int, node: int, data_parallel: int, compute: Compute) -> float:
        costs, vision = self._costs, self._costs.vision_parameters
        layers = costs.decoder_parameters - costs.embedding_parameters
        layer = layers / self._model.num_layers
        kept = (WEIGHT + GRADIENT + OPTIMIZER) * (layers / shards + costs.embedding_parameters / min(shards, node))
        if compute.fp8:  # what other ranks read; between nodes, where they read nothing, of two layers
            kept += PUBLISHED * (2 * layer if shards > node else layers) / shards
        tower = vision * (WEIGHT + GRADIENT + OPTIMIZER / data_parallel + compute.fp8)
        buffers = (WORKING_WEIGHT_FP8 if compute.fp8 else WORKING_WEIGHT) + WORKING_GRADIENT + RECEIVED / shards
        return kept + tower + buffers * layer

    def _state(self, tensor_parallel: int, data_parallel: int, compute: Compute) -> float:
        # The vision tower is whole on every rank.
        parameters = self._costs.decoder_parameters / tensor_parallel + self._costs.vision_parameters
        state = parameters * (WEIGHT + GRADIENT + OPTIMIZER / data_parallel)
        # In fp8 the layers' weights are kept in 8 bits too, once or twice.
        in_8_bits = parameters - self._costs.embedding_parameters / tensor_parallel
        return state + (compute.fp8 + compute.transposed_weights) * in_8_bits

    def _activations(self, tensor_parallel: int, tokens: int, compute: Compute) -> float:
        h, layers, recomputed = self._model.hidden_size, self._model.num_layers, compute.recomputed_layers
        layer = self._costs.layer_bytes(compute) / tensor_parallel
        # A recomputed layer keeps its input. While one is recomputed, those behind it have freed what they held.
        kept = max(layers - recomputed, 1) * layer + recomputed * 2 * h / tensor_parallel
        kept -= compute.offloaded_layers * self._costs.swiglu_bytes / tensor_parallel
        return tokens * (kept + 8 * h)

    def _vision(self, patches: int, compute: Compute) -> float:
        return patches * self._costs.patch_bytes(compute)

    def _sharded_logits(self, shards: int) -> float:
        # Of a chunk of all ranks' tokens: the logits of this rank's rows; decoder outputs, their gradient, their sum.
        return 2 * CHUNK * (self._model.vocab_size / shards + 3 * self._model.hidden_size)

    def _logits(self, tensor_parallel: int, tokens: int) -> float:
        # Logits, whose gradient takes their place: a chunk of them. Under tensor parallelism all of them, and the
        # gradient of the whole embedding.
        rows = min(tokens, CHUNK) if tensor_parallel == 1 else tokens + self._model.hidden_size
        return 2 * rows * self._model.vocab_size / tensor_parallel
