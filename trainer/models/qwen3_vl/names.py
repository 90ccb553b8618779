"""Qwen3-VL's tensors: the decoder is Qwen3's, under the names of the released files."""

from dataclasses import replace

from trainer.models.config import ModelConfig
from trainer.models.names import HEAD, Row, prefixed
from trainer.models.qwen3 import names as qwen3
from trainer.models.qwen3_vl.config import vision_of
from trainer.models.transforms import COPY, PATCH_EMBED, Transform

EMBEDDING = prefixed(
    "vision.",
    "model.visual.",
    (
        ("patch_embed.weight", "patch_embed.proj.weight", PATCH_EMBED),
        ("patch_embed.bias", "patch_embed.proj.bias", COPY),
        ("position_embed.weight", "pos_embed.weight", COPY),
    ),
)


def _copied(*pairs: tuple[str, str]) -> tuple[tuple[str, str, Transform], ...]:
    """Return the entries of modules' weights and biases. `pairs`: our name and theirs."""
    kinds = ("weight", "bias")
    return tuple((f"{mine}.{kind}", f"{theirs}.{kind}", COPY) for mine, theirs in pairs for kind in kinds)


BLOCK = prefixed(
    "vision.blocks.{}.",
    "model.visual.blocks.{}.",
    _copied(
        ("norm1", "norm1"),
        ("attn.qkv", "attn.qkv"),
        ("attn.proj", "attn.proj"),
        ("norm2", "norm2"),
        ("mlp.fc1", "mlp.linear_fc1"),
        ("mlp.fc2", "mlp.linear_fc2"),
    ),
)
_MERGER = _copied(("norm", "norm"), ("fc1", "linear_fc1"), ("fc2", "linear_fc2"))
MERGER = prefixed("vision.merger.", "model.visual.merger.", _MERGER)
DEEPSTACK = prefixed("vision.merger.deepstack.{}.", "model.visual.deepstack_merger_list.{}.", _MERGER)


def table(config: ModelConfig) -> tuple[Row, ...]:
    """Return every tensor of this model, in the order of the forward pass."""
    vision = vision_of(config)
    blocks = (row.at(n) for n in range(vision.depth) for row in BLOCK)
    deepstack = (row.at(n) for n in range(len(vision.deepstack_blocks)) for row in DEEPSTACK)
    decoder = (replace(row, hf=tuple(canonical(name) for name in row.hf)) for row in qwen3.table(config))
    return (*EMBEDDING, *blocks, *MERGER, *deepstack, *decoder)


def canonical(name: str) -> str:
    """Return a Hugging Face name in the layout of the table.

    It has two: `model.language_model.layers`, `model.visual` in the released files and in those transformers 5 writes;
    `model.layers`, `visual` as Qwen2.5-VL has them.
    """
    if name in HEAD.hf or name.startswith(("model.language_model.", "model.visual.")):
        return name
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
