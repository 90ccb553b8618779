"""The released dense Qwen3 models, from their config.json files: for planning, without a download."""

from trainer.models.config import ModelConfig


def _dense(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        model_type="qwen3",
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        max_positions=40_960,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        mrope_section=(64, 0, 0),
        qkv_bias=False,
        qk_norm=True,
        tied=tied,
        initializer_range=0.02,
        image_token_id=None,
        vision=None,
    )


SIZES = {
    "Qwen3-0.6B": _dense(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": _dense(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": _dense(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": _dense(4096, 12_288, 36, 32, tied=False),
    "Qwen3-14B": _dense(5120, 17_408, 40, 40, tied=False),
    "Qwen3-32B": _dense(5120, 25_600, 64, 64, tied=False),
}
