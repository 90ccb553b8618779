"""Qwen3-VL's tensors: the decoder is Qwen3's, under the names of the released files."""

from dataclasses import replace

from trainer.models.config import ModelConfig
from trainer.models.names import HEAD, Entry, Row, prefixed
from trainer.models.qwen3 import names as qwen3
from trainer.models.qwen3_vl.config import vision_of
from trainer.models.transforms import COPY, PATCH_EMBED

EMBEDDING = prefixed(
    "vision.",
    "model.visual.",
    (
        ("patch_embed.weight", "patch_embed.proj.weight", "h.c.t.s.s", PATCH_EMBED),
        ("patch_embed.bias", "patch_embed.proj.bias", "h", COPY),
        ("position_embed.weight", "pos_embed.weight", "n.h", COPY),
    ),
)


def _copied(*modules: tuple[str, str, str]) -> tuple[Entry, ...]:
    """Return the entries of modules' weights and biases. `modules`: our name, theirs, the weight's shape."""
    return tuple(
        entry
        for mine, theirs, shape in modules
        for entry in (
            (f"{mine}.weight", f"{theirs}.weight", shape, COPY),
            (f"{mine}.bias", f"{theirs}.bias", shape.split(".")[0], COPY),
        )
    )


BLOCK = prefixed(
    "vision.blocks.{}.",
    "model.visual.blocks.{}.",
    _copied(
        ("norm1", "norm1", "h"),
        ("attn.qkv", "attn.qkv", "qkv.h"),
        ("attn.proj", "attn.proj", "h.h"),
        ("norm2", "norm2", "h"),
        ("mlp.fc1", "mlp.linear_fc1", "f.h"),
        ("mlp.fc2", "mlp.linear_fc2", "h.f"),
    ),
)


def _merger(norm: str) -> tuple[Entry, ...]:
    """Return the entries of a merger whose norm has this width: a deepstack merger norms what it has joined."""
    return _copied(("norm", "norm", norm), ("fc1", "linear_fc1", "m.m"), ("fc2", "linear_fc2", "o.m"))


MERGER = prefixed("vision.merger.", "model.visual.merger.", _merger("h"))
DEEPSTACK = prefixed("vision.merger.deepstack.{}.", "model.visual.deepstack_merger_list.{}.", _merger("m"))


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
