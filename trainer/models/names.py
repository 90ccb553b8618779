"""Tensor names: which Hugging Face tensors make up which tensor of a megatron checkpoint, walked both ways.

A family's table is made of these rows. The vocabulary has the same rows on both sides.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.models.config import ModelConfig
from trainer.models.transforms import COPY, Transform


@dataclass(frozen=True)
class Row:
    """One megatron tensor and the Hugging Face tensors it is made of. `{}` in a name is the layer's number."""

    megatron: str
    hf: tuple[str, ...]
    transform: Transform = COPY

    def at(self, layer: int) -> "Row":
        """Return the row of one layer."""
        return Row(self.megatron.format(layer), tuple(name.format(layer) for name in self.hf), self.transform)


def prefixed(megatron: str, hf: str, table: Iterable[tuple[str, str, Transform]]) -> tuple[Row, ...]:
    """Return rows of `(megatron name, space-separated Hugging Face names, transform)`, each name behind its prefix."""
    return tuple(
        Row(megatron + mine, tuple(hf + name for name in theirs.split()), transform)
        for mine, theirs, transform in table
    )


EMBEDDING = Row("language.embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
HEAD = Row("language.output_layer.weight", ("lm_head.weight",))  # untied models only
FINAL_NORM = Row("language.decoder.final_layernorm.weight", ("model.norm.weight",))


def decoder_layer(*table: tuple[str, str, Transform]) -> tuple[Row, ...]:
    """Return the rows of one decoder layer, with names relative to the layer."""
    return prefixed("language.decoder.layers.{}.", "model.layers.{}.", table)


def decoder_table(config: ModelConfig, layer: Iterable[Row]) -> tuple[Row, ...]:
    """Return every tensor of a decoder whose layers have the rows of `layer`."""
    layers = (row.at(n) for n in range(config.num_layers) for row in layer)
    return (EMBEDDING, *layers, FINAL_NORM, *(() if config.tied else (HEAD,)))
