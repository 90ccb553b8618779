"""What a model is: the sizes and options that a family reads from a Hugging Face folder's config.json.

Imports neither torch nor megatron: the planner, the cost model and the converter's names all start from here.
"""

import json
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from kanyun.errors import UserError
from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and how its pixels are normalised. A family adds what only its own towers have."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int  # = the language model's hidden size
    patch_size: int
    temporal_patch_size: int
    merge_size: int  # merge_size x merge_size patches become one visual token
    initializer_range: float
    image_mean: tuple[float, ...]  # of pixels in 0..1, one value a channel
    image_std: tuple[float, ...]

    def __post_init__(self) -> None:
        _require_numbers(self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def channels(self) -> int:
        return len(self.image_mean)


@dataclass(frozen=True)
class ModelConfig:
    """The decoder, and the vision tower if the model has one."""

    model_type: str  # of config.json; the registry knows its family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # num_heads x head_dim may differ from hidden_size
    max_positions: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]  # frequencies of time, height, width; together half of head_dim
    qkv_bias: bool
    qk_norm: bool  # an RMSNorm over each head's query and key, before RoPE
    tied: bool  # output head = input embedding
    initializer_range: float
    image_token_id: int | None
    vision: VisionConfig | None

    def __post_init__(self) -> None:
        _require_numbers(self)

    @classmethod
    def from_hf(cls, folder: str) -> "ModelConfig":
        """Read config.json of a Hugging Face folder (path or URI), as transformers 4 or 5 writes it.

        Raises UserError if there is no config.json, if no family knows its model_type, or if it asks for an option that
        the family's released models do not use.
        """
        from trainer.models.registry import get_family  # families import this module

        root = Folder(folder)
        if not root.exists("config.json"):
            raise UserError(f"{root.uri} has no config.json: {no_model(root)}")
        try:
            values = json.loads(root.read("config.json"))
            return get_family(values["model_type"], where=root.uri).read_config(values, root)
        except (KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
            fault = f"incomplete ({error!r})" if isinstance(error, KeyError) else f"damaged ({error})"
            raise UserError(f"{root.uri}/config.json is {fault}: download the model again") from error


def no_model(folder: Folder) -> str:
    """Return the way out for a folder without model weights, as the end of an error message."""
    if folder.exists("adapter_config.json"):
        return "it is a LoRA adapter, so merge it into its base model (peft's merge_and_unload) and give that folder"
    return "give a Hugging Face folder with safetensors weights"


def _require_numbers(config: ModelConfig | VisionConfig) -> None:
    """Raises ValueError naming the first size that is not a whole number above 0, or factor that is not positive."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{field.name} is {value!r}, not a whole number above 0")
        least = 0 if field.name == "initializer_range" else 1e-300
        if field.type is float and not (isinstance(value, int | float) and isfinite(value) and value >= least):
            raise ValueError(f"{field.name} is {value!r}, not a number above 0")


def read_decoder(
    values: dict[str, Any], folder: Folder, *, head_dim: int | None, default_theta: float = 1e4, **options: Any
) -> ModelConfig:
    """Return the part of a ModelConfig that every family's config.json spells alike; `options` are the other fields.

    `head_dim`: None for hidden_size / heads, and then config.json must not say otherwise. `default_theta`:
    transformers', where config.json has none. Raises UserError for an option that the trainer does not have.
    """
    text = decoder_settings(values)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}  # transformers' order
    scaling = rope.get("rope_type", rope.get("type", "default"))
    usual_head_dim = text["hidden_size"] // text["num_attention_heads"]
    other_head_dim = head_dim is None and text.get("head_dim") not in (None, usual_head_dim)
    head_dim = head_dim or usual_head_dim
    quantization = values.get("quantization_config") or text.get("quantization_config")
    refuse_options(
        folder,
        {
            "sliding-window attention": _slides(text),
            f"head_dim {text.get('head_dim')}, not hidden_size / num_attention_heads = {head_dim}": other_head_dim,
            f"weights quantized by {(quantization or {}).get('quant_method')!r}": quantization is not None,
            f"rope scaling {scaling!r}": scaling not in ("default", "mrope"),
            f"hidden_act {text.get('hidden_act')!r}": text.get("hidden_act", "silu") != "silu",
        },
    )
    # A text token has three equal positions, so for a text model any section gives plain RoPE.
    section = options.setdefault("mrope_section", (head_dim // 2, 0, 0))
    if sum(section) != head_dim // 2 or any(type(count) is not int or count < 0 for count in section):
        raise UserError(
            f"{folder.uri}/config.json has mrope_section {list(section)}, which are not whole numbers whose sum is "
            f"half of head_dim {head_dim}: download the model again"
        )
    fields = {
        "model_type": values["model_type"],
        "vocab_size": text["vocab_size"],
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": text["num_attention_heads"],
        "num_kv_heads": text["num_key_value_heads"] or text["num_attention_heads"],
        "head_dim": head_dim,
        "max_positions": text["max_position_embeddings"],
        "norm_eps": text["rms_norm_eps"],
        "rope_theta": float(rope.get("rope_theta") or text.get("rope_theta") or default_theta),
        # transformers 5 reads it from the root, older versions wrote it into text_config: either says yes.
        "tied": bool(values.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        "initializer_range": text.get("initializer_range", 0.02),
        "image_token_id": None,
        "vision": None,
    }
    return ModelConfig(**fields | options)


def decoder_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return the decoder's part of config.json: transformers 5 nests that of a vision-language model in text_config,
    older versions wrote it flat. What is beside text_config means nothing to it.
    """
    nested: dict[str, Any] | None = values.get("text_config")
    return values if nested is None else nested


def vision_fields(vision: dict[str, Any], folder: Folder) -> dict[str, Any]:
    """Return the fields of VisionConfig; `vision`: vision_config of config.json, which every family spells alike.

    Raises UserError if the folder has no processor settings.
    """
    processor = fingerprint(folder).processor
    if processor is None:
        raise UserError(f"{folder.uri} has no preprocessor_config.json: put the image model's processor settings there")
    return {
        "depth": vision["depth"],
        "hidden_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "num_heads": vision["num_heads"],
        "out_hidden_size": vision["out_hidden_size"],
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "initializer_range": vision.get("initializer_range", 0.02),
        "image_mean": tuple(processor["image_mean"]),
        "image_std": tuple(processor["image_std"]),
    }


def refuse_options(folder: Folder, options: dict[str, bool]) -> None:
    """Raise UserError for the first option of config.json that is set. `options`: its name -> whether it is set."""
    for option, is_set in options.items():
        if is_set:
            raise UserError(
                f"{folder.uri}/config.json has {option}, which this trainer does not implement; without it the weights "
                "would compute something else: use a model that was trained without it"
            )


def _slides(text: dict[str, Any]) -> bool:
    """Return whether some layer attends within a window shorter than the longest sequence."""
    layers = text["num_hidden_layers"]
    window = text.get("sliding_window", 4096) if text.get("use_sliding_window") else None
    first = text.get("max_window_layers", 28)  # layers from this one on slide; the defaults are transformers'
    kinds = text.get("layer_types") or ["sliding_attention" if window and n >= first else "" for n in range(layers)]
    return "sliding_attention" in kinds and (not window or window < text["max_position_embeddings"])


@dataclass(frozen=True)
class Compute:
    """How a model computes: precision, activation checkpointing and offloading. The planner chooses it."""

    fp8: bool = False  # matrix products of the layers in 8 bits, with one scale a tensor
    # Activation checkpointing: N layers of the decoder, behind those that are offloaded, and N blocks of the vision
    # tower are recomputed in the backward pass.
    recomputed_layers: int = 0
    recomputed_blocks: int = 0
    # Activation offloading: SwiGLU's inputs of the decoder's first N layers wait in host memory (models/offload.py).
    offloaded_layers: int = 0
    # Weights in fp8 are also kept transposed, for the backward pass, and not transposed in each one: see Fp8Weights.
    transposed_weights: bool = False


BFLOAT16 = Compute()
