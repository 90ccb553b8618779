"""Qwen3's tensors: Qwen2.5's without biases, with a norm over each head's query and key."""

from trainer.models.config import ModelConfig
from trainer.models.names import Row, decoder_layer, decoder_table
from trainer.models.qwen2_5 import names as qwen2_5
from trainer.models.transforms import COPY

LAYER = (
    *(row for row in qwen2_5.LAYER if not row.megatron.endswith(".bias")),
    *decoder_layer(
        ("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "D", COPY),
        ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "D", COPY),
    ),
)


def table(config: ModelConfig) -> tuple[Row, ...]:
    """Return every tensor of this model, layer by layer."""
    return decoder_table(config, LAYER)
