"""The released dense Qwen3-VL models, from their config.json files: for planning, without a download."""

from dataclasses import replace

from trainer.models.config import ModelConfig
from trainer.models.qwen3.sizes import SIZES as QWEN3
from trainer.models.qwen3_vl.config import MROPE_SECTION, DeepstackVisionConfig


def _vision(depth: int, hidden: int, intermediate: int, deepstack: tuple[int, ...], out: int) -> DeepstackVisionConfig:
    return DeepstackVisionConfig(
        depth=depth,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=16,
        out_hidden_size=out,
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        initializer_range=0.02,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        position_side=48,
        deepstack_blocks=deepstack,
    )


def _with_vision(text: ModelConfig, *tower: int, deepstack: tuple[int, ...]) -> ModelConfig:
    depth, hidden, intermediate = tower
    return replace(
        text,
        model_type="qwen3_vl",
        max_positions=262_144,
        rope_theta=5_000_000.0,
        mrope_section=MROPE_SECTION,
        image_token_id=151_655,
        vision=_vision(depth, hidden, intermediate, deepstack, text.hidden_size),
    )


_LARGE, _LARGE_TAPS = (24, 1024, 4096), (5, 11, 17)
_SO400M, _SO400M_TAPS = (27, 1152, 4304), (8, 16, 24)
SIZES = {
    "Qwen3-VL-2B": _with_vision(QWEN3["Qwen3-1.7B"], *_LARGE, deepstack=_LARGE_TAPS),
    "Qwen3-VL-4B": _with_vision(QWEN3["Qwen3-4B"], *_LARGE, deepstack=_LARGE_TAPS),
    "Qwen3-VL-8B": _with_vision(QWEN3["Qwen3-8B"], *_SO400M, deepstack=_SO400M_TAPS),
    "Qwen3-VL-32B": _with_vision(QWEN3["Qwen3-32B"], *_SO400M, deepstack=_SO400M_TAPS),
}
