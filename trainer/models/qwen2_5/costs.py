"""Floating point operations of the model, as its mathematics needs them: the numerator of MFU.

A matrix product [m, k] x [k, n] takes 2 m k n. Attention of a segment takes two such products a layer: scores (query x
key) and output (weights x value). Norms, softmax, rope and activations are left out, as usual; they are below 1 %.
"""

from torch import Tensor

from trainer.data.batch import Batch, VisionBatch
from trainer.data.source import PackCost
from trainer.models.qwen2_5.config import ModelConfig, VisionConfig

# Backward computes two products for each one of forward: gradients of the input and of the weight.
TRAINING = 3


def forward_flops(config: ModelConfig, batch: Batch) -> int:
    """Of one micro-batch on the CPU: every token slot, each segment's attention, and the real images.

    Padding tails of packs count (they are 1 to 2 % of the slots); patches that fill up a static shape do not.
    """
    # Causal: token i of a segment looks at i + 1 tokens, so a segment of n has n (n + 1) / 2 pairs.
    lengths = batch.cu_seqlens.diff().long()
    pairs = int((lengths * (lengths + 1)).sum()) // 2
    flops = len(batch.input_ids) * token_flops(config) + pairs * pair_flops(config)
    if config.vision is not None and batch.vision is not None:
        flops += vision_flops(config.vision, batch.vision, batch.real_patches)
    return flops


def token_flops(config: ModelConfig) -> int:
    """Matrix products of one token: in each layer query, key and value; output; gate and up; down. Then the head."""
    h, d = config.hidden_size, config.head_dim
    attention = h * (config.num_heads + 2 * config.num_kv_heads) * d + config.num_heads * d * h
    mlp = 3 * h * config.intermediate_size
    return 2 * (config.num_layers * (attention + mlp) + h * config.vocab_size)


def pair_flops(config: ModelConfig) -> int:
    """One token attending to one token: scores and output, over all heads and layers."""
    return config.num_layers * 2 * 2 * config.num_heads * config.head_dim


def vision_flops(config: VisionConfig, images: VisionBatch, patches: int) -> int:
    """The tower on the first `patches`; the others are padding."""
    full = len(config.full_attention_blocks)
    squares = full * _squares(images.cu_images, patches) + (config.depth - full) * _squares(images.cu_windows, patches)
    return patches * patch_flops(config) + squares * 2 * 2 * config.hidden_size


def patch_flops(config: VisionConfig) -> int:
    """Matrix products of one patch: embedding, blocks (query, key, value; output; gate, up, down), merger.

    Both frames of an image are the same, so the embedding reads one. The merger works on merge_size^2 patches at once.
    """
    h, unit = config.hidden_size, config.merge_size**2
    embedding = config.channels * config.patch_size**2 * h
    block = 4 * h * h + 3 * h * config.intermediate_size
    merger = (unit * h) ** 2 + unit * h * config.out_hidden_size
    return 2 * (embedding + config.depth * block) + 2 * merger // unit


def pack_cost(config: ModelConfig) -> PackCost:
    """What makes one pack dearer than another, for choosing packs of about the same cost: n^2 / 2 pairs a segment, and
    patches, whose attention is taken as within windows (full attention adds 5 % for a 784 x 784 picture).
    """
    vision = config.vision
    window = (vision.window_size // vision.patch_size) ** 2 * 4 * vision.hidden_size * vision.depth if vision else 0
    return PackCost(pair=pair_flops(config) / 2, patch=patch_flops(vision) + window if vision else 0)


def _squares(cumulative: Tensor, patches: int) -> int:
    """Sum of squared segment lengths; segments behind the first `patches` are padding."""
    lengths = cumulative.clamp(max=patches).diff().long()
    return int((lengths * lengths).sum())
