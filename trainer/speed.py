"""Predicted time of a training step: what it computes and moves, over what kernels were measured to reach.

Sums up matrix products, attention, passes over memory, casts to fp8 and communication. Rates are an H100's, from
profiles of 0.5B, 1.5B and 3B (benchmarks/README.md), where the sum is within 3 % of what was measured, for segments of
about 900 tokens. Other cards are scaled by their data sheets, several GPUs by NVLink's and a network's usual rates.
"""

from typing import NamedTuple

from trainer.flops import TRAINING, pair_flops, patch_flops, token_flops
from trainer.model.config import Compute, ModelConfig

SEGMENT = 900  # tokens of a sample
# Of an H100, FLOP/s or bytes/s.
PRODUCTS, PRODUCTS_FP8 = 720e12, 1345e12
ATTENTION = 170e12  # of such segments: a third of what long ones reach
TOWER = 350e12  # all of the vision tower
ELEMENTWISE, NORMS = 3.0e12, 2.0e12
NVLINK, NETWORK = 300e9, 45e9  # of a GPU, in a node and between nodes
NODE = 8
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


def step_seconds(
    model: ModelConfig, parameters: int, card: Card, gpus: int, split: int, tokens: int, patches: int, compute: Compute
) -> float:
    """Of a step on `gpus`, each `split` of which share a model and work on `tokens` slots and `patches`."""
    h, f, layers = model.hidden_size, model.intermediate_size, model.num_layers
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    faster, wider = card.flops / CARDS["H100"].flops, card.bandwidth / CARDS["H100"].bandwidth

    head = 2 * h * model.vocab_size
    runs = TRAINING + compute.recomputed_layers / layers
    products = runs * (token_flops(model) - head) / (PRODUCTS_FP8 if compute.fp8 else PRODUCTS)
    products += TRAINING * head / PRODUCTS
    attention = (runs + 0.5) * pair_flops(model) * SEGMENT / 2 / ATTENTION  # backward takes 5 products to forward's 2
    # Bytes of a token: SwiGLU reads and writes 8 f values in both passes; norms, residuals and rope about 24 h; the
    # cross entropy reads the logits twice and writes their gradient; a cast to fp8 takes 5 bytes a value.
    moved = layers * 2 * 8 * f / ELEMENTWISE + layers * 2 * 24 * h / NORMS + 2 * 3 * model.vocab_size / ELEMENTWISE
    if compute.fp8:
        moved += layers * 5 * ((2 * h + q + f) + (q + 2 * kv + 2 * h + 2 * f)) / (ELEMENTWISE * 0.83)
    exchanged = layers * 10 * 2 * h * (split - 1) / NVLINK if split > 1 else 0  # activations, each way, in both passes

    seconds = tokens / split * ((products + attention) / faster + moved / wider + exchanged)
    if model.vision:
        again = compute.recomputed_blocks / model.vision.depth
        seconds += patches * (TRAINING + again) * patch_flops(model.vision) / TOWER / faster
    ranks = gpus // split
    update = 26 * parameters / split / ranks / (ELEMENTWISE * wider)
    link = NVLINK if gpus <= NODE else NETWORK
    reduced = (4 + 2) * parameters / split * (ranks - 1) / ranks / link  # gradients and weights, not overlapped
    return seconds * REST + update + reduced
