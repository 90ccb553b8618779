"""Predicted time of a training step: what it computes and moves, over what kernels were measured to reach.

Sums up matrix products, attention, passes over memory, casts to fp8 and communication. Rates are an H100's, from
profiles of 0.5B and 1.5B. The sum is within 6 % of what was measured from 0.5B to 7B (benchmarks/README.md), in samples
of about 900 tokens; 8 % above it with two in a pack. Other GPUs are scaled by their data sheets, several GPUs by
NVLink's and a network's usual rates.
"""

from typing import NamedTuple

from trainer.models.config import Compute, ModelConfig
from trainer.models.costs import TRAINING
from trainer.models.registry import costs_of
from trainer.planning.gpus import GPU, GPUS

SEGMENT = 900  # tokens of a sample
# Of an H100, FLOP/s or bytes/s.
PRODUCTS, PRODUCTS_FP8 = 720e12, 1345e12
ATTENTION = 170e12  # of such segments: a third of what long ones reach
TOWER, TOWER_FP8 = 440e12, 510e12  # all of the vision tower, with attention within windows
PICTURES = 240e12  # attention within whole pictures, as measured in Qwen2.5-VL's; in Qwen3-VL not yet
ELEMENTWISE, NORMS, CASTS = 3.0e12, 2.0e12, 2.5e12
# Bytes/s of NCCL's rings ("bus bandwidth"): in a node; for each GPU of a node that takes part in a ring between nodes,
# by its own 400 Gb/s network card; and the most that a node reaches, of 8 x 50 GB/s. The last two: not measured.
NVLINK, NETWORK, NETWORK_NODE = 300e9, 45e9, 350e9
NODE = 8
# What an exchange beside compute costs nonetheless, of its time alone: NCCL's kernels hold multiprocessors that matrix
# products wait for. 1.5B on two H100s: 11 of 15 ms; a reduce-scatter of a 7B layer 0.98 of 1.67, a gather 0.88 of 0.98.
BESIDE = 0.6
# Bytes of a parameter: Adam reads and writes 20; setting gradients to 0, scaling them, their norm and clipping 24.
UPDATE = 44
# Gaps between kernels, clipping, reductions of bias gradients, copies.
REST = 1.12


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


class SpeedModel:
    """Speed of one model's training step on one kind of GPU."""

    def __init__(self, model: ModelConfig, gpu: GPU) -> None:
        self._model, self._costs = model, costs_of(model)
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

    def step_seconds(
        self, *, gpus: int, tensor_parallel: int, tokens: int, patches: int, compute: Compute, micro_batches: int = 1
    ) -> float:
        """Return the seconds of a step on `gpus`.

        `tokens` and `patches`: what each tensor-parallel group works on in it, in `micro_batches`.
        """
        token = self.work(compute)
        computed = token.products / (PRODUCTS_FP8 if compute.fp8 else PRODUCTS)
        computed += token.head / PRODUCTS + token.attention / ATTENTION
        moved = (token.swiglu + token.loss) / ELEMENTWISE + token.norms / NORMS + token.casts / CASTS
        # Activations, each way, in both passes.
        exchanged = self._model.num_layers * 10 * 2 * self._model.hidden_size * (tensor_parallel - 1) / NVLINK
        tower = token.tower / (TOWER_FP8 if compute.fp8 else TOWER) + token.pictures / PICTURES
        seconds = tokens / tensor_parallel * (computed / self._faster + moved / self._wider + exchanged)
        seconds += patches * tower / self._faster
        seconds *= REST
        reduce, gather, adam = self._update(gpus // tensor_parallel, tensor_parallel, gpus)
        # The last backward pass hides the reduce-scatter of gradients, the first forward pass the gather of weights.
        backward, forward = 2 / 3 * seconds / micro_batches, 1 / 3 * seconds / micro_batches
        return seconds + adam + _exposed(reduce, backward) + _exposed(gather, forward)

    def _update(self, data_parallel: int, tensor_parallel: int, gpus: int) -> tuple[float, float, float]:
        """Return the seconds of the gradients' reduce-scatter, of the weights' all-gather and of the optimizer."""
        parameters = self._costs.parameters / tensor_parallel
        adam = UPDATE * parameters / data_parallel / (ELEMENTWISE * self._wider)
        link = NVLINK if gpus <= NODE else min(NETWORK * (NODE // tensor_parallel), NETWORK_NODE)
        sent = parameters * (data_parallel - 1) / data_parallel / link
        return 4 * sent, 2 * sent, adam


def _exposed(exchange: float, compute: float) -> float:
    """Return the seconds that an exchange adds to the compute it runs beside."""
    return max(exchange - compute, 0.0) + BESIDE * min(exchange, compute)
