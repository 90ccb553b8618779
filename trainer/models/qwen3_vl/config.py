"""Qwen3-VL's config.json as a ModelConfig."""

from dataclasses import dataclass
from math import isqrt
from typing import Any

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.models.config import ModelConfig, VisionConfig, read_decoder, refuse_options, vision_fields
from trainer.models.qwen3.config import HEAD_DIM

# transformers' defaults where config.json has none.
THETA, MROPE_SECTION = 5e5, (24, 20, 20)


@dataclass(frozen=True)
class DeepstackVisionConfig(VisionConfig):
    """A tower with learned positions, some of whose blocks are fed into the decoder's first layers."""

    position_side: int  # rows, and columns, of the square grid of learned positions
    deepstack_blocks: tuple[int, ...]  # the n-th of them in the order of the blocks is added behind decoder layer n


def read_config(values: dict[str, Any], folder: Folder) -> ModelConfig:
    """Return the configuration; see Family.read_config."""
    text, vision = values["text_config"], values["vision_config"]
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}  # transformers' order
    vision_rope = vision.get("rope_parameters") or {}
    refuse_options(
        folder,
        {
            "attention_bias": bool(text.get("attention_bias")),
            "mrope_interleaved false": rope.get("mrope_interleaved") is False,
            f"vision rope_theta {vision_rope.get('rope_theta')}": vision_rope.get("rope_theta", 1e4) != 1e4,
            f"vision hidden_act {vision.get('hidden_act')!r}": (
                vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh"
            ),
        },
    )
    return read_decoder(
        values,
        folder,
        head_dim=text.get("head_dim", HEAD_DIM),
        default_theta=THETA,
        mrope_section=tuple(rope.get("mrope_section") or MROPE_SECTION),
        qkv_bias=False,
        qk_norm=True,
        tied=bool(values.get("tie_word_embeddings")),  # transformers asks the root alone, unlike for Qwen2.5-VL
        image_token_id=values["image_token_id"],
        vision=_vision_config(vision, folder),
    )


def vision_of(config: ModelConfig) -> DeepstackVisionConfig:
    """Return the vision tower's part of a model's configuration."""
    assert isinstance(config.vision, DeepstackVisionConfig)
    return config.vision


def _vision_config(vision: dict[str, Any], folder: Folder) -> DeepstackVisionConfig:
    positions, blocks = vision["num_position_embeddings"], tuple(vision["deepstack_visual_indexes"])
    side = isqrt(positions)
    if side**2 != positions:
        raise UserError(
            f"{folder.uri}/config.json has {positions} num_position_embeddings, which is no square: download the model "
            "again"
        )
    if len(set(blocks)) < len(blocks) or any(block not in range(vision["depth"]) for block in blocks):
        raise UserError(
            f"{folder.uri}/config.json has deepstack_visual_indexes {list(blocks)}, which are not distinct blocks of "
            f"{vision['depth']}: download the model again"
        )
    return DeepstackVisionConfig(**vision_fields(vision, folder), position_side=side, deepstack_blocks=blocks)
