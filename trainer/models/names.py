"""Tensor names: which Hugging Face tensors make up which tensor of a megatron checkpoint, walked both ways.

A family's table is made of these rows. The vocabulary has the same rows on both sides.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from trainer.models.config import ModelConfig, VisionConfig
from trainer.models.transforms import COPY, Transform

# A row as a table spells it: megatron name, Hugging Face names, their shapes in letters (see `decoder_widths`), and how
# they become one. Names and shapes are separated by spaces, the letters of a shape by points.
Entry = tuple[str, str, str, Transform]


@dataclass(frozen=True)
class Row:
    """One megatron tensor and the Hugging Face tensors it is made of. `{}` in a name is the layer's number."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]  # of `hf`: "V.H" is [V, H]
    transform: Transform = COPY

    def at(self, layer: int) -> "Row":
        """Return the row of one layer."""
        return replace(self, megatron=self.megatron.format(layer), hf=tuple(name.format(layer) for name in self.hf))

    def hf_shapes(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return Hugging Face name -> shape. `widths`: what the letters stand for, see Family.widths."""
        shapes = (tuple(widths[letter] for letter in shape.split(".")) for shape in self.shapes)
        return dict(zip(self.hf, shapes, strict=True))


def decoder_widths(config: ModelConfig) -> dict[str, int]:
    """Return the letters of a decoder's shapes: V vocabulary, H hidden size, F MLP neurons, D one head, Q all query
    heads, KV all key (or value) heads.
    """
    return {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "F": config.intermediate_size,
        "D": config.head_dim,
        "Q": config.num_heads * config.head_dim,
        "KV": config.num_kv_heads * config.head_dim,
    }


def tower_widths(vision: VisionConfig) -> dict[str, int]:
    """Return the letters of a vision tower's shapes: h hidden size, qkv three of it, f MLP neurons, m what the merger
    joins to one visual token, o what it makes of it; c, t and s the channels, frames and side of a patch.
    """
    return {
        "h": vision.hidden_size,
        "qkv": 3 * vision.hidden_size,
        "f": vision.intermediate_size,
        "m": vision.hidden_size * vision.merge_size**2,
        "o": vision.out_hidden_size,
        "c": vision.channels,
        "t": vision.temporal_patch_size,
        "s": vision.patch_size,
    }


def prefixed(megatron: str, hf: str, table: Iterable[Entry]) -> tuple[Row, ...]:
    """Return the rows of a table, each name behind its prefix."""
    return tuple(
        Row(megatron + mine, tuple(hf + name for name in theirs.split()), tuple(shapes.split()), transform)
        for mine, theirs, shapes, transform in table
    )


EMBEDDING = Row("language.embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("V.H",))
HEAD = Row("language.output_layer.weight", ("lm_head.weight",), ("V.H",))  # untied models only
FINAL_NORM = Row("language.decoder.final_layernorm.weight", ("model.norm.weight",), ("H",))


def decoder_layer(*table: Entry) -> tuple[Row, ...]:
    """Return the rows of one decoder layer, with names relative to the layer."""
    return prefixed("language.decoder.layers.{}.", "model.layers.{}.", table)


def decoder_table(config: ModelConfig, layer: Iterable[Row]) -> tuple[Row, ...]:
    """Return every tensor of a decoder whose layers have the rows of `layer`."""
    layers = (row.at(n) for n in range(config.num_layers) for row in layer)
    return (EMBEDDING, *layers, FINAL_NORM, *(() if config.tied else (HEAD,)))
