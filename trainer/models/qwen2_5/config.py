"""What a Qwen2.5 or Qwen2.5-VL model is: the facts of a Hugging Face folder's config.json, and nothing else."""

import json
from dataclasses import dataclass
from typing import Any

from kanyun.errors import UserError
from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and how its pixels are normalised."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int  # = the language model's hidden size
    patch_size: int
    temporal_patch_size: int
    merge_size: int  # merge_size x merge_size patches become one visual token
    window_size: int  # pixels
    full_attention_blocks: tuple[int, ...]  # the others attend within windows
    initializer_range: float
    image_mean: tuple[float, ...]  # of pixels in 0..1, one a channel
    image_std: tuple[float, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_intermediate_size(self) -> int:
        """As our weights have it: 3420 is no multiple of 8, which matrix products want (of 16 in fp8), so 36 neurons
        are added that always give 0: their weights and biases are 0, and so are the gradients of those.
        """
        return -(-self.intermediate_size // 64) * 64

    @property
    def longest_window(self) -> int:
        """Patches."""
        return (self.window_size // self.patch_size) ** 2

    @property
    def channels(self) -> int:
        return len(self.image_mean)


@dataclass(frozen=True)
class ModelConfig:
    """The language model, and the vision tower if there is one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]  # frequencies of time, height, width; together half of head_dim
    tied: bool  # output head = input embedding
    initializer_range: float
    image_token_id: int | None
    vision: VisionConfig | None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_hf(cls, folder: str) -> "ModelConfig":
        """From a Hugging Face folder (path or URI), in the layout of transformers 4 (flat) or 5 (nested text_config).

        Raises UserError: no config.json, another architecture, an option that Qwen2.5's released models don't use.
        """
        root = Folder(folder)
        if not root.exists("config.json"):
            raise UserError(f"{root.uri} has no config.json: give a Hugging Face folder of Qwen2.5 or Qwen2.5-VL")
        try:
            return _model_config(json.loads(root.read("config.json")), root)
        except (KeyError, ValueError) as error:
            raise UserError(f"{root.uri}/config.json is incomplete ({error!r}): download the model again") from error


def _model_config(config: dict[str, Any], folder: Folder) -> ModelConfig:
    kind = config["model_type"]
    if kind not in ("qwen2", "qwen2_5_vl"):
        raise UserError(f"{folder.uri} is a {kind!r} model: give one of qwen2 (Qwen2.5) or qwen2_5_vl (Qwen2.5-VL)")
    text = {**config, **config.get("text_config", {})}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "use_sliding_window": bool(text.get("use_sliding_window")),
        f"rope scaling {scaling!r}": scaling not in ("default", "mrope"),
        f"hidden_act {text.get('hidden_act')!r}": text.get("hidden_act", "silu") != "silu",
    }
    for what, used in refused.items():
        if used:
            raise UserError(f"{folder.uri}/config.json asks for {what}, which this trainer doesn't have: remove it")

    half_head = text["hidden_size"] // text["num_attention_heads"] // 2
    vl = kind == "qwen2_5_vl"
    # A text token has three equal positions, so for a text model any section gives plain rope.
    time, height, width = rope["mrope_section"] if vl else (half_head, 0, 0)
    return ModelConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        max_positions=text["max_position_embeddings"],
        norm_eps=text["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
        mrope_section=(time, height, width),
        # transformers 5 reads it from the root, older ones wrote it into text_config: either says yes.
        tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        initializer_range=text.get("initializer_range", 0.02),
        image_token_id=config["image_token_id"] if vl else None,
        vision=_vision_config(config["vision_config"], folder) if vl else None,
    )


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


@dataclass(frozen=True)
class Compute:
    """How a model computes what it does; layout.py decides."""

    fp8: bool = False  # matrix products of the layers in 8 bits, tensors scaled one by one
    # So many, the first, keep only their input for the backward pass, and run again in it.
    recomputed_layers: int = 0  # of the language model
    recomputed_blocks: int = 0  # of the vision tower


BFLOAT16 = Compute()
