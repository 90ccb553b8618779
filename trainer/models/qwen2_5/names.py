"""Qwen2.5's and Qwen2.5-VL's tensors. Of the vision tower, only the gated MLP is padded on our side."""

from trainer.models.config import ModelConfig
from trainer.models.names import Row, decoder_layer, decoder_table, prefixed
from trainer.models.qwen2_5.padding import VISION_DOWN, VISION_GATE_UP
from trainer.models.transforms import COPY, GATE_UP, PATCH_EMBED, QKV

# Hugging Face names as transformers 5 writes them, for text and VL alike; `canonical` knows the other layout.
LAYER = decoder_layer(
    # Transformer Engine fuses a norm into the linear layer behind it; checkpoints have its names on CPU too.
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H", COPY),
    (
        "self_attention.linear_qkv.weight",
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
        "Q.H KV.H KV.H",
        QKV,
    ),
    (
        "self_attention.linear_qkv.bias",
        "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias",
        "Q KV KV",
        QKV,
    ),
    ("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H.Q", COPY),
    ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "H", COPY),
    ("mlp.linear_fc1.weight", "mlp.gate_proj.weight mlp.up_proj.weight", "F.H F.H", GATE_UP),
    ("mlp.linear_fc2.weight", "mlp.down_proj.weight", "H.F", COPY),
)
PATCHES = Row("vision.patch_embed.weight", ("visual.patch_embed.proj.weight",), ("h.c.t.s.s",), PATCH_EMBED)
VISION_BLOCK = prefixed(
    "vision.blocks.{}.",
    "visual.blocks.{}.",
    (
        ("norm1.weight", "norm1.weight", "h", COPY),
        ("attn.qkv.weight", "attn.qkv.weight", "qkv.h", COPY),
        ("attn.qkv.bias", "attn.qkv.bias", "qkv", COPY),
        ("attn.proj.weight", "attn.proj.weight", "h.h", COPY),
        ("attn.proj.bias", "attn.proj.bias", "h", COPY),
        ("norm2.weight", "norm2.weight", "h", COPY),
        ("mlp.gate_up.weight", "mlp.gate_proj.weight mlp.up_proj.weight", "f.h f.h", VISION_GATE_UP),
        ("mlp.gate_up.bias", "mlp.gate_proj.bias mlp.up_proj.bias", "f f", VISION_GATE_UP),
        ("mlp.down.weight", "mlp.down_proj.weight", "h.f", VISION_DOWN),
        ("mlp.down.bias", "mlp.down_proj.bias", "h", COPY),
    ),
)
MERGER = prefixed(
    "vision.merger.",
    "visual.merger.",
    (
        ("norm.weight", "ln_q.weight", "h", COPY),
        ("fc1.weight", "mlp.0.weight", "m.m", COPY),
        ("fc1.bias", "mlp.0.bias", "m", COPY),
        ("fc2.weight", "mlp.2.weight", "o.m", COPY),
        ("fc2.bias", "mlp.2.bias", "o", COPY),
    ),
)


def table(config: ModelConfig) -> tuple[Row, ...]:
    """Return every tensor of this model, in the order of the forward pass."""
    decoder = decoder_table(config, LAYER)
    if config.vision is None:
        return decoder
    blocks = (row.at(n) for n in range(config.vision.depth) for row in VISION_BLOCK)
    return (PATCHES, *blocks, *MERGER, *decoder)


def canonical(name: str) -> str:
    """Return a Hugging Face name in the layout of the table.

    Qwen2.5-VL has two: `model.layers`, `visual` in the released files and in those transformers 5 writes;
    `model.language_model.layers`, `model.visual` in those of some 4.x versions, and in models in memory.
    """
    for other, ours in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(other):
            return ours + name.removeprefix(other)
    return name
