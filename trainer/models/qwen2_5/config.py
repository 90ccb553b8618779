"""Qwen2.5's and Qwen2.5-VL's config.json as a ModelConfig."""

from typing import Any

from kanyun.errors import UserError
from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder
from trainer.models.config import ModelConfig, VisionConfig, read_decoder


def read_config(values: dict[str, Any], folder: Folder) -> ModelConfig:
    """Return the configuration; see Family.read_config."""
    options: dict[str, Any] = {"qkv_bias": True, "qk_norm": False}
    if values["model_type"] == "qwen2_5_vl":
        options["default_theta"] = 1e6
        text = {**values, **values.get("text_config", {})}
        time, height, width = (text.get("rope_parameters") or text["rope_scaling"])["mrope_section"]
        options["mrope_section"] = (time, height, width)
        options["image_token_id"] = values["image_token_id"]
        options["vision"] = _vision_config(values["vision_config"], folder)
    return read_decoder(values, folder, head_dim=None, **options)


def _vision_config(vision: dict[str, Any], folder: Folder) -> VisionConfig:
    processor = fingerprint(folder).processor
    if processor is None:
        raise UserError(f"{folder.uri} has no preprocessor_config.json: put the image model's processor settings there")
    return VisionConfig(
        depth=vision["depth"],
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_heads=vision["num_heads"],
        out_hidden_size=vision["out_hidden_size"],
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
        window_size=vision["window_size"],
        full_attention_blocks=tuple(vision["fullatt_block_indexes"]),
        initializer_range=vision.get("initializer_range", 0.02),
        image_mean=tuple(processor["image_mean"]),
        image_std=tuple(processor["image_std"]),
    )
