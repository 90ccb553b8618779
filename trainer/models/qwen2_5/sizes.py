"""The released Qwen2.5 and Qwen2.5-VL models, from their config.json files: for planning, without a download."""

from dataclasses import replace

from trainer.models.config import ModelConfig
from trainer.models.qwen2_5.config import WindowedVisionConfig


def _text(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, vocabulary: int = 152_064, tied: bool
) -> ModelConfig:
    return ModelConfig(
        model_type="qwen2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_positions=32_768,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        mrope_section=(hidden // heads // 2, 0, 0),
        qkv_bias=True,
        qk_norm=False,
        tied=tied,
        initializer_range=0.02,
        image_token_id=None,
        vision=None,
    )


def _vision(intermediate: int, out: int) -> WindowedVisionConfig:
    return WindowedVisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=intermediate,
        num_heads=16,
        out_hidden_size=out,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        window_size=112,
        full_attention_blocks=(7, 15, 23, 31),
        initializer_range=0.02,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
    )


def _with_vision(text: ModelConfig, vision_intermediate: int) -> ModelConfig:
    return replace(
        text,
        model_type="qwen2_5_vl",
        image_token_id=151_655,
        mrope_section=(16, 24, 24),
        vision=_vision(vision_intermediate, text.hidden_size),
    )


_3B = _text(2048, 11_008, 36, 16, 2, vocabulary=151_936, tied=True)
_7B = _text(3584, 18_944, 28, 28, 4, tied=False)
_32B = _text(5120, 27_648, 64, 40, 8, tied=False)
_72B = _text(8192, 29_568, 80, 64, 8, tied=False)
SIZES = {
    "Qwen2.5-0.5B": _text(896, 4864, 24, 14, 2, vocabulary=151_936, tied=True),
    "Qwen2.5-1.5B": _text(1536, 8960, 28, 12, 2, vocabulary=151_936, tied=True),
    "Qwen2.5-3B": _3B,
    "Qwen2.5-7B": _7B,
    "Qwen2.5-14B": _text(5120, 13_824, 48, 40, 8, tied=False),
    "Qwen2.5-32B": _32B,
    "Qwen2.5-72B": _72B,
    "Qwen2.5-VL-3B": _with_vision(_3B, 3420),
    "Qwen2.5-VL-7B": _with_vision(_7B, 3420),
    "Qwen2.5-VL-32B": _with_vision(_32B, 3456),
    "Qwen2.5-VL-72B": _with_vision(_72B, 3456),
}
