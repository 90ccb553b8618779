"""Qwen3's config.json as a ModelConfig."""

from typing import Any

from kanyun.storage import Folder
from trainer.models.config import ModelConfig, read_decoder, refuse_options

HEAD_DIM = 128  # transformers' default where config.json has none


def read_config(values: dict[str, Any], folder: Folder) -> ModelConfig:
    """Return the configuration; see Family.read_config."""
    refuse_options(folder, {"attention_bias": bool(values.get("attention_bias"))})
    return read_decoder(values, folder, head_dim=values.get("head_dim", HEAD_DIM), qkv_bias=False, qk_norm=True)
