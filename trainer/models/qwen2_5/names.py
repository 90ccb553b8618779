"""The one table of names: which Hugging Face tensors make up which tensor of a megatron checkpoint. Walked both ways.

The vocabulary has the same rows on both sides; of the vision tower, only the gated MLP is padded here.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from kanyun.errors import UserError
from trainer.models.qwen2_5.config import ModelConfig
from trainer.models.transforms import COPY, GATE_UP, PATCH_EMBED, QKV, VISION_DOWN, VISION_GATE_UP, Transform


@dataclass(frozen=True)
class Row:
    """A line of the table: one megatron tensor and the Hugging Face tensors it is made of. `{}` is a layer's number."""

    megatron: str
    hf: tuple[str, ...]
    transform: Transform = COPY

    def at(self, layer: int) -> "Row":
        return Row(self.megatron.format(layer), tuple(name.format(layer) for name in self.hf), self.transform)


def _rows(megatron: str, hf: str, table: Iterable[tuple[str, str, Transform]]) -> tuple[Row, ...]:
    """Lines `(megatron name, Hugging Face names apart by spaces, transform)`, each name behind its prefix."""
    return tuple(
        Row(megatron + mine, tuple(hf + name for name in theirs.split()), transform)
        for mine, theirs, transform in table
    )


# Hugging Face names as transformers 5 writes them, for text and VL alike; `canonical` knows the other layout.
EMBEDDING = Row("language.embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
HEAD = Row("language.output_layer.weight", ("lm_head.weight",))  # untied models only
FINAL_NORM = Row("language.decoder.final_layernorm.weight", ("model.norm.weight",))
LANGUAGE_LAYER = _rows(
    "language.decoder.layers.{}.",
    "model.layers.{}.",
    (
        # Transformer Engine fuses a norm into the linear layer behind it; checkpoints have its names on CPU too.
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", COPY),
        (
            "self_attention.linear_qkv.weight",
            "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
            QKV,
        ),
        ("self_attention.linear_qkv.bias", "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias", QKV),
        ("self_attention.linear_proj.weight", "self_attn.o_proj.weight", COPY),
        ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", COPY),
        ("mlp.linear_fc1.weight", "mlp.gate_proj.weight mlp.up_proj.weight", GATE_UP),
        ("mlp.linear_fc2.weight", "mlp.down_proj.weight", COPY),
    ),
)
PATCHES = Row("vision.patch_embed.weight", ("visual.patch_embed.proj.weight",), PATCH_EMBED)
VISION_BLOCK = _rows(
    "vision.blocks.{}.",
    "visual.blocks.{}.",
    (
        ("norm1.weight", "norm1.weight", COPY),
        ("attn.qkv.weight", "attn.qkv.weight", COPY),
        ("attn.qkv.bias", "attn.qkv.bias", COPY),
        ("attn.proj.weight", "attn.proj.weight", COPY),
        ("attn.proj.bias", "attn.proj.bias", COPY),
        ("norm2.weight", "norm2.weight", COPY),
        ("mlp.gate_up.weight", "mlp.gate_proj.weight mlp.up_proj.weight", VISION_GATE_UP),
        ("mlp.gate_up.bias", "mlp.gate_proj.bias mlp.up_proj.bias", VISION_GATE_UP),
        ("mlp.down.weight", "mlp.down_proj.weight", VISION_DOWN),
        ("mlp.down.bias", "mlp.down_proj.bias", COPY),
    ),
)
MERGER = _rows(
    "vision.merger.",
    "visual.merger.",
    (
        ("norm.weight", "ln_q.weight", COPY),
        ("fc1.weight", "mlp.0.weight", COPY),
        ("fc1.bias", "mlp.0.bias", COPY),
        ("fc2.weight", "mlp.2.weight", COPY),
        ("fc2.bias", "mlp.2.bias", COPY),
    ),
)


def table(config: ModelConfig) -> tuple[Row, ...]:
    """Every tensor of this model, in the order of the forward pass."""
    rows: list[Row] = []
    if config.vision:
        rows += [PATCHES, *(row.at(n) for n in range(config.vision.depth) for row in VISION_BLOCK), *MERGER]
    rows += [EMBEDDING, *(row.at(n) for n in range(config.num_layers) for row in LANGUAGE_LAYER), FINAL_NORM]
    return tuple(rows if config.tied else [*rows, HEAD])


def canonical(name: str) -> str:
    """A Hugging Face name in the layout of the table.

    Qwen2.5-VL has two: `model.layers`, `visual` in the released files and in those transformers 5 writes;
    `model.language_model.layers`, `model.visual` in those of some 4.x versions, and in models in memory.
    """
    for other, ours in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(other):
            return ours + name.removeprefix(other)
    return name


def require_same(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """UserError naming the tensors that are missing from `found`, left over, or there twice."""
    have, want = Counter(list(found)), Counter(expected)
    faults = {"is missing": want - have, "is left over": have - want}
    for fault, names in faults.items():
        if names:
            listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UserError(f"{where}: {listed} {fault}, by its config.json: give a whole and unchanged model")
