"""The families of the vision benchmarks: config.json as the hub has it, the data's pictures, the peer's kernels."""

import sys
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_text import text_config
from trainer.models.config import ModelConfig
from trainer.models.registry import published_sizes

SIZES = published_sizes()
_TOKENS = {"video_token_id": 151_656, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653}
_VISION_NAMES = {"merge_size": "spatial_merge_size", "full_attention_blocks": "fullatt_block_indexes"}
_VISION_NAMES |= {"deepstack_blocks": "deepstack_visual_indexes"}


@dataclass(frozen=True)
class Benchmarked:
    """What the benchmarks know of one family."""

    size: str  # the model that packs are made for; they serve all sizes
    side: int  # pixels of the pictures of packs with 2, 4 and 6
    modeling: str  # of transformers
    apply_kernels: str  # of Liger
    small: ModelConfig  # for loss curves


def _small(size: str, text: str, section: tuple[int, int, int], **tower: Any) -> ModelConfig:
    """A text model's widths and the tower's, fewer layers and blocks."""
    model, decoder = SIZES[size], SIZES[text]
    assert model.vision is not None
    return replace(
        decoder,
        model_type=model.model_type,
        num_layers=8,
        mrope_section=section,
        image_token_id=model.image_token_id,
        vision=replace(model.vision, depth=6, out_hidden_size=decoder.hidden_size, **tower),
    )


FAMILIES = {
    "qwen2_5_vl": Benchmarked(
        size="Qwen2.5-VL-3B",
        side=784,
        modeling="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        apply_kernels="apply_liger_kernel_to_qwen2_5_vl",
        small=_small("Qwen2.5-VL-3B", "Qwen2.5-0.5B", (8, 12, 12), full_attention_blocks=(3,)),
    ),
    "qwen3_vl": Benchmarked(
        size="Qwen3-VL-4B",
        side=768,
        modeling="transformers.models.qwen3_vl.modeling_qwen3_vl",
        apply_kernels="apply_liger_kernel_to_qwen3_vl",
        small=_small("Qwen3-VL-4B", "Qwen3-0.6B", (24, 20, 20), deepstack_blocks=(1, 2, 4)),
    ),
}


def hf_config(model_config: ModelConfig) -> dict[str, Any]:
    """config.json of an image model, as the hub has it."""
    vision = model_config.vision
    assert vision is not None
    tower = {_VISION_NAMES.get(name, name): value for name, value in asdict(vision).items()}
    for made_elsewhere in ("image_mean", "image_std"):  # processor settings
        del tower[made_elsewhere]
    decoder: dict[str, Any] = text_config(model_config)
    decoder["rope_scaling"] = {"mrope_section": list(model_config.mrope_section)}
    ids = {"image_token_id": model_config.image_token_id, **_TOKENS}
    if model_config.model_type == "qwen2_5_vl":
        decoder["rope_scaling"]["type"] = "mrope"
        names = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
        tower |= {"in_chans": vision.channels, "hidden_act": "silu"}
        return decoder | names | ids | {"dtype": "bfloat16", "vision_config": tower}
    decoder["rope_scaling"] |= {"rope_type": "default", "mrope_interleaved": True}
    decoder |= {"model_type": "qwen3_vl_text", "head_dim": model_config.head_dim, "attention_bias": False}
    del decoder["architectures"]
    tower["num_position_embeddings"] = tower.pop("position_side") ** 2
    tower |= {"in_channels": vision.channels, "hidden_act": "gelu_pytorch_tanh"}
    return {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "tie_word_embeddings": model_config.tied,
        "dtype": "bfloat16",
        "text_config": decoder,
        "vision_config": tower,
        **ids,
    }


def add_kernels(model_type: str) -> None:
    """Put Liger's kernels into transformers' model."""
    import liger_kernel.transformers as liger
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    family = FAMILIES[model_type]
    getattr(liger, family.apply_kernels)()
    modeling: Any = import_module(family.modeling)
    # transformers 5 puts the three axes of mrope together before it: the plain kernel is the one that fits.
    modeling.apply_rotary_pos_emb = liger_rotary_pos_emb
    if model_type == "qwen3_vl":  # Liger has SwiGLU's kernel, and leaves this model's as it is
        modeling.Qwen3VLTextMLP = liger.LigerSwiGLUMLP
