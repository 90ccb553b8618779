"""Qwen2.5's and Qwen2.5-VL's config.json as a ModelConfig."""

from dataclasses import dataclass
from typing import Any

from kanyun.storage import Folder
from trainer.models.config import (
    ModelConfig,
    VisionConfig,
    decoder_settings,
    read_decoder,
    refuse_options,
    vision_fields,
)


@dataclass(frozen=True)
class WindowedVisionConfig(VisionConfig):
    """A tower most of whose blocks attend within windows."""

    window_size: int  # pixels
    full_attention_blocks: tuple[int, ...]  # all other blocks attend within windows

    def __post_init__(self) -> None:
        super().__post_init__()
        token = self.patch_size * self.merge_size
        if self.window_size < token:
            raise ValueError(f"window_size is {self.window_size}, less than one visual token's {token} pixels")

    @property
    def padded_intermediate_size(self) -> int:
        """Neurons of the gated MLP in our weights, a multiple of 64.

        3420 is no multiple of 8, which matrix products want (16 in fp8). The 36 added neurons always give 0: their
        weights and biases are 0, and so are the gradients of those.
        """
        return -(-self.intermediate_size // 64) * 64

    @property
    def longest_window(self) -> int:
        """Patches of a whole attention window."""
        return (self.window_size // self.patch_size) ** 2


def read_config(values: dict[str, Any], folder: Folder) -> ModelConfig:
    """Return the configuration; see Family.read_config."""
    options: dict[str, Any] = {"qkv_bias": True, "qk_norm": False}
    if values["model_type"] == "qwen2_5_vl":
        options["default_theta"] = 1e6
        text = decoder_settings(values)
        time, height, width = (text.get("rope_scaling") or text["rope_parameters"])["mrope_section"]
        options["mrope_section"] = (time, height, width)
        options["image_token_id"] = values["image_token_id"]
        vision = values["vision_config"]
        act = vision.get("hidden_act", "silu")
        refuse_options(folder, {f"vision hidden_act {act!r}": act != "silu"})
        options["vision"] = WindowedVisionConfig(
            **vision_fields(vision, folder),
            window_size=vision["window_size"],
            full_attention_blocks=tuple(vision["fullatt_block_indexes"]),
        )
    return read_decoder(values, folder, head_dim=None, **options)


def vision_of(config: ModelConfig) -> WindowedVisionConfig:
    """Return the vision tower's part of an image model's configuration."""
    assert isinstance(config.vision, WindowedVisionConfig)
    return config.vision
