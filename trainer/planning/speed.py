"""Predicted time of a training step: what it computes and moves, over what kernels were measured to reach.

Sums up matrix products, attention, passes over memory, casts to fp8 and communication. Rates are an H100's, from
profiles of 0.5B and 1.5B. The sum is within 6 % of what was measured from 0.5B to 7B (benchmarks/README.md), in samples
of about 900 tokens; 8 % above it with two in a pack. Other cards are scaled by their data sheets, several GPUs by
NVLink's and a network's usual rates.
"""

from typing import NamedTuple

from trainer.models.config import Compute, ModelConfig
from trainer.models.costs import TRAINING
from trainer.models.registry import costs_of

SEGMENT = 900  # tokens of a sample
# Of an H100, FLOP/s or bytes/s.
PRODUCTS, PRODUCTS_FP8 = 720e12, 1345e12
ATTENTION = 170e12  # of such segments: a third of what long ones reach
TOWER, TOWER_FP8 = 440e12, 510e12  # all of the vision tower
ELEMENTWISE, NORMS, CASTS = 3.0e12, 2.0e12, 2.5e12
NVLINK, NETWORK = 300e9, 45e9  # of a GPU, in a node and between nodes
NODE = 8
# Bytes of a parameter: Adam reads and writes 20; setting gradients to 0, scaling them, their norm and clipping 24.
UPDATE = 44
# Gaps between kernels, clipping, reductions of bias gradients, copies.
REST = 1.12


class Card(NamedTuple):
    memory: float  # bytes, as CUDA reports it
    flops: float  # dense bfloat16 peak, FLOP/s, from NVIDIA's data sheets
    bandwidth: float  # bytes/s, likewise
    fp8: bool


CARDS = {
    "H100": Card(85.0e9, 989e12, 3.35e12, fp8=True),
    "H200": Card(150.0e9, 989e12, 4.8e12, fp8=True),
    "A100": Card(85.0e9, 312e12, 2.04e12, fp8=False),
}


class Work(NamedTuple):
    """What training does for a token (of the tower: a patch); FLOPs, or bytes through memory."""

    products: float  # of the layers
    head: float
    attention: float  # causal, within samples of SEGMENT
    swiglu: float
    norms: float  # with rope, residuals and biases
    loss: float
    casts: float  # to fp8
    tower: float  # FLOPs of a patch, attention not counted


def work(model: ModelConfig, compute: Compute) -> Work:
    """Recomputation is counted. Attention's backward pass takes 5 products to forward's 2, all others' takes twice as
    many as forward's.
    """
    h, f, layers, costs = model.hidden_size, model.intermediate_size, model.num_layers, costs_of(model)
    q, kv = costs.query_width, costs.kv_width
    runs = TRAINING + compute.recomputed_layers / layers
    vision = model.vision
    return Work(
        products=runs * (costs.token_flops - costs.head_flops),
        head=TRAINING * costs.head_flops,
        attention=(runs + 0.5) * costs.pair_flops * SEGMENT / 2,
        swiglu=layers * 2 * 8 * f,  # reads and writes 8 values in both passes
        norms=layers * costs.norm_bytes,
        loss=2 * 3 * model.vocab_size,  # logits are read twice, their gradient written
        casts=layers * 5 * ((2 * h + q + f) + (q + 2 * kv + 2 * h + 2 * f)) * compute.fp8,  # 5 bytes a value
        tower=(TRAINING + compute.recomputed_blocks / vision.depth) * costs.patch_flops if vision else 0,
    )


def step_seconds(
    model: ModelConfig, parameters: int, card: Card, gpus: int, split: int, tokens: int, patches: int, compute: Compute
) -> float:
    """Of a step on `gpus`, each `split` of which share a model and work on `tokens` slots and `patches`."""
    faster, wider = card.flops / CARDS["H100"].flops, card.bandwidth / CARDS["H100"].bandwidth
    token = work(model, compute)
    computed = token.products / (PRODUCTS_FP8 if compute.fp8 else PRODUCTS)
    computed += token.head / PRODUCTS + token.attention / ATTENTION
    moved = (token.swiglu + token.loss) / ELEMENTWISE + token.norms / NORMS + token.casts / CASTS
    # Activations, each way, in both passes.
    exchanged = model.num_layers * 10 * 2 * model.hidden_size * (split - 1) / NVLINK
    tower = token.tower / (TOWER_FP8 if compute.fp8 else TOWER)
    seconds = tokens / split * (computed / faster + moved / wider + exchanged) + patches * tower / faster
    ranks = gpus // split
    update = UPDATE * parameters / split / ranks / (ELEMENTWISE * wider)
    link = NVLINK if gpus <= NODE else NETWORK
    reduced = (4 + 2) * parameters / split * (ranks - 1) / ranks / link  # gradients and weights, not overlapped
    return seconds * REST + update + reduced
