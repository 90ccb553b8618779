"""Hugging Face folders with the tensor shapes of a published size and random bits in them."""

import json
from pathlib import Path

import torch

from convert.checks import Layout
from convert.hf_writer import HFWriter, Planned
from tests.support.qwen3_vl_assets import tiny_qwen3_vl_folder
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder
from trainer.models.config import ModelConfig
from trainer.models.qwen3_vl.config import DeepstackVisionConfig
from trainer.models.registry import family_of

PERIOD = 1_000_003  # a prime: no row, block or head is like another


def write_model(folder: Path, size: ModelConfig, layers: int = 1, vocab_size: int | None = None) -> None:
    """Write a Hugging Face folder with other bits in every tensor, in bfloat16.

    Args:
        layers: Of the decoder. A vision tower has one block.
        vocab_size: Rows of the embedding; those of the test tokenizer if None.
    """
    vision = size.vision
    deepstack = isinstance(vision, DeepstackVisionConfig)
    (tiny_qwen3_vl_folder if deepstack else tiny_vl_folder if vision else tiny_text_folder)(folder)
    values = json.loads((folder / "config.json").read_text())
    text = values.get("text_config", values)
    text |= {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "layer_types": ["full_attention"] * layers,
        "vocab_size": vocab_size or text["vocab_size"],
    }
    values |= {"model_type": size.model_type, "tie_word_embeddings": size.tied}
    if "head_dim" in text or size.head_dim * size.num_heads != size.hidden_size:
        text["head_dim"] = size.head_dim
    if vision:
        text["rope_parameters"]["mrope_section"] = list(size.mrope_section)
        values["vision_config"] |= {
            "depth": 1,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "out_hidden_size": vision.out_hidden_size,
        }
        if isinstance(vision, DeepstackVisionConfig):
            blocks = {"deepstack_visual_indexes": [0], "num_position_embeddings": vision.position_side**2}
        else:
            blocks = {"fullatt_block_indexes": [0]}
        values["vision_config"] |= blocks
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").unlink()

    config = ModelConfig.from_hf(str(folder))
    shapes = Layout.of(folder, config, family_of(config).table(config)).hf
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (PERIOD,), generator=generator, dtype=torch.int16) & ~0x4000  # all finite
    planned = [Planned(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    with HFWriter(folder, planned, folder) as writer:
        for number, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            drawn = bits.roll(number * 7919).repeat(-(-count // PERIOD))[:count]
            writer.add(name, drawn.view(torch.bfloat16).view(shape))
