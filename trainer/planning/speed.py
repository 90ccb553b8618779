"""Predicted time of a training step: what it computes and moves, over what kernels were measured to reach.

Sums up matrix products, attention, passes over memory, casts to fp8, exchange and the optimizer. Rates are an H100's,
from profiles of 0.5B and 1.5B. The sum is within 6 % of every measured row (tests/unit/test_layout_measured.py), in
samples of about 900 tokens. Other GPUs are scaled by their data sheets, several GPUs by NVLink's and a network's rates.
"""

from typing import NamedTuple

from trainer.models.config import Compute, ModelConfig
from trainer.models.costs import TRAINING
from trainer.models.registry import costs_of
from trainer.planning.exchange import (
    SHARDED_GRADIENT,
    SHARDED_SUM,
    exposed,
    vocabulary_exchange,
    weight_exchange,
    whole_exchange,
)
from trainer.planning.gpus import GPU, GPUS, NODE, NVLINK

SEGMENT = 900  # tokens of a sample
# Of an H100, FLOP/s or bytes/s.
PRODUCTS, PRODUCTS_FP8 = 720e12, 1345e12
ATTENTION = 170e12  # of such segments: a third of what long ones reach
TOWER, TOWER_FP8 = 440e12, 510e12  # all of the vision tower, with attention within windows
PICTURES = 360e12  # attention within whole pictures, in heads of 64 channels: Qwen3-VL-4B's tower
ELEMENTWISE, NORMS, CASTS = 3.0e12, 2.0e12, 2.75e12
# Bytes of a parameter: Adam reads and writes 20; setting gradients to 0, scaling them, their norm and clipping 24.
UPDATE = 44
# Bytes of a parameter in each micro-batch: a gradient is added in place to float32; a weight in fp8 is transposed where
# its transpose is not kept. Under tensor parallelism it is cast twice, as it is and transposed. Otherwise once a step:
# read for its maximum, read, and written.
ADDED, TRANSPOSED, CAST, CAST_ONCE = 8, 2, 6, 5
# Gaps between kernels, clipping, reductions of bias gradients, copies.
REST = 1.10


class Work(NamedTuple):
    """What training does for a token (in the tower: a patch); FLOPs, or bytes through memory."""

    products: float  # of the layers
    head: float
    attention: float  # causal, within samples of SEGMENT
    swiglu: float
    norms: float  # with RoPE, residuals and biases
    loss: float
    casts: float  # to fp8
    tower: float  # FLOPs of a patch, attention not counted
    pictures: float  # its attention, where all of it is within whole pictures


class StepTime(NamedTuple):
    """Seconds of a step, part by part."""

    products: float  # of layers and output head
    attention: float
    passes: float  # over memory: SwiGLU, norms, loss, and adding up gradients of weights
    casts: float  # of activations and weights to fp8
    tower: float  # all of the vision tower
    rest: float
    exchange: float  # between GPUs, what no compute hides
    optimizer: float

    @property
    def seconds(self) -> float:
        return sum(self)


class SpeedModel:
    """Speed of one model's training step on one kind of GPU, `node` of them in a node."""

    def __init__(self, model: ModelConfig, gpu: GPU, node: int = NODE) -> None:
        self._model, self._costs, self._node = model, costs_of(model), node
        self._gpu = gpu
        self._faster, self._wider = gpu.flops / GPUS["H100"].flops, gpu.bandwidth / GPUS["H100"].bandwidth

    def work(self, compute: Compute) -> Work:
        """Return the work for a token and a patch, recomputation included.

        Attention's backward pass takes 5 products to forward's 2, all others' takes twice as many as forward's.
        """
        model, costs = self._model, self._costs
        h, f, layers, q, kv = (
            model.hidden_size,
            model.intermediate_size,
            model.num_layers,
            costs.query_width,
            costs.kv_width,
        )
        passes = TRAINING + compute.recomputed_layers / layers
        tower_passes = TRAINING + (compute.recomputed_blocks / model.vision.depth if model.vision else 0)
        return Work(
            products=passes * (costs.token_flops - costs.head_flops),
            head=TRAINING * costs.head_flops,
            attention=(passes + 0.5) * costs.pair_flops * SEGMENT / 2,
            swiglu=layers * 2 * 8 * f,  # reads and writes 8 values in both passes
            norms=layers * costs.norm_bytes,
            loss=2 * 3 * model.vocab_size,  # logits are read twice, their gradient written
            casts=layers * 5 * ((2 * h + q + f) + (q + 2 * kv + 2 * h + 2 * f)) * compute.fp8,  # 5 bytes a value
            tower=tower_passes * costs.patch_flops,
            pictures=(tower_passes + 0.5) * costs.picture_flops,
        )

    def flops(self, tokens: int, patches: int) -> float:
        """Return the model's FLOPs of a step, without recomputation: MFU's numerator."""
        costs = self._costs
        token = costs.token_flops + costs.pair_flops * SEGMENT / 2
        return TRAINING * (tokens * token + patches * (costs.patch_flops + costs.picture_flops))

    def offloadable(self, compute: Compute) -> int:
        """Return how many layers' SwiGLU inputs PCIe carries to the host in the time of a forward pass.

        With eight of 3B's 36 layers a step took 0.9 % more, as long as memory takes to read and write them; with 16,
        which PCIe cannot carry in that time, 23 %.
        """
        token, layers = self.work(Compute(compute.fp8)), self._model.num_layers
        compute_bound = token.products / (PRODUCTS_FP8 if compute.fp8 else PRODUCTS) + token.attention / ATTENTION
        memory_bound = token.swiglu / ELEMENTWISE + token.norms / NORMS + token.casts / CASTS
        both_passes = REST * (compute_bound / self._faster + memory_bound / self._wider)
        carried = both_passes / TRAINING * self._gpu.host_link  # bytes of a token
        return min(int(carried / self._costs.swiglu_bytes), (layers - compute.recomputed_layers) // 2)

    def step(
        self,
        *,
        gpus: int,
        tensor_parallel: int,
        tokens: int,
        patches: int,
        compute: Compute,
        micro_batches: int = 1,
        weight_shards: int = 1,
    ) -> StepTime:
        """Return the time of a step on `gpus`.

        `tokens` and `patches`: what each tensor-parallel group works on in it, in `micro_batches`.
        """
        alone = self._computed(tensor_parallel, weight_shards, tokens, patches, compute, micro_batches)
        seconds = REST * alone.seconds
        exchange = self._exchange(gpus, tensor_parallel, weight_shards, seconds, compute, micro_batches)
        if weight_shards > 1:
            values, parameters = tokens * self._model.hidden_size, self._costs.embedding_parameters
            exchange += vocabulary_exchange(values, parameters, gpus=gpus, shards=min(weight_shards, self._node))
        # Activations under tensor parallelism, each way, in both passes.
        activations = self._model.num_layers * 10 * 2 * self._model.hidden_size * (tensor_parallel - 1) / NVLINK
        ranks = weight_shards if weight_shards > 1 else gpus // tensor_parallel
        adam = UPDATE * self._costs.parameters / tensor_parallel / ranks / (ELEMENTWISE * self._wider)
        return alone._replace(
            rest=seconds - alone.seconds, exchange=exchange + tokens / tensor_parallel * activations, optimizer=adam
        )

    def _computed(
        self, split: int, weight_shards: int, tokens: int, patches: int, compute: Compute, micro_batches: int
    ) -> StepTime:
        """Return the parts that a GPU computes; `split`: tensor-parallel size."""
        token = self.work(compute)
        parameters, layers = self._costs.parameters / split, self._layers / split
        products = token.products / (PRODUCTS_FP8 if compute.fp8 else PRODUCTS) + token.head / PRODUCTS
        offloaded = 2 * compute.offloaded_layers * self._costs.swiglu_bytes  # read by one copy, written by the other
        passes = (token.swiglu + token.loss + offloaded) / ELEMENTWISE + token.norms / NORMS
        added, cast = float(ADDED), float(CAST)
        if weight_shards > 1:
            added = SHARDED_GRADIENT + SHARDED_SUM / weight_shards
        if split == 1:
            transposed = TRANSPOSED / (micro_batches if compute.transposed_weights else 1)
            cast = CAST_ONCE / weight_shards / micro_batches + transposed
        gradients = micro_batches * (added * layers + ADDED * (parameters - layers)) / ELEMENTWISE
        weights = compute.fp8 * micro_batches * cast * layers / ELEMENTWISE
        return StepTime(
            products=tokens / split * products / self._faster,
            attention=tokens / split * token.attention / ATTENTION / self._faster,
            passes=(tokens / split * passes + gradients) / self._wider,
            casts=(tokens / split * token.casts / CASTS + weights) / self._wider,
            tower=patches
            * (token.tower / (TOWER_FP8 if compute.fp8 else TOWER) + token.pictures / PICTURES)
            / self._faster,
            rest=0.0,
            exchange=0.0,
            optimizer=0.0,
        )

    def _exchange(
        self, gpus: int, split: int, weight_shards: int, seconds: float, compute: Compute, micro_batches: int
    ) -> float:
        """Return what the exchange of weights and gradients adds to `seconds` of compute."""
        backward, forward = 2 / 3 * seconds / micro_batches, 1 / 3 * seconds / micro_batches
        # Of whole weights: the last backward pass hides the reduce-scatter, the first forward pass the gather.
        whole = self._costs.parameters / split if weight_shards == 1 else self._costs.vision_parameters
        reduce, gather = whole_exchange(whole, gpus=gpus, tensor_parallel=split, node=self._node)
        once = exposed(reduce, backward) + exposed(gather, forward)
        if weight_shards == 1:
            return once
        sent = weight_exchange(
            self._layers,
            layers=self._model.num_layers,
            fp8=compute.fp8,
            gpus=gpus,
            shards=weight_shards,
            node=self._node,
        )
        return once + sent.exposed(forward, backward, micro_batches)

    @property
    def _layers(self) -> int:
        """Parameters of the decoder's layers, and of the vision tower, which is small."""
        return self._costs.parameters - self._costs.embedding_parameters
