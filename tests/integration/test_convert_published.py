"""Every published size there and back, bit for bit: its real tensor shapes, with one layer and a small vocabulary.

The vocabulary is the test tokenizer's: with the real 152,064 rows of 8,192 channels a 72B's two embeddings alone would
be 5 GB. Rows of an embedding are copied whatever their number is. The largest model here has 2 GB of weights.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from convert.checks import TensorShapes
from convert.hf_writer import HFWriter, Planned
from convert.to_hf import to_hf
from convert.to_megatron import to_megatron
from tests.support.qwen3_vl_assets import tiny_qwen3_vl_folder
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder
from trainer.models.config import ModelConfig
from trainer.models.qwen3_vl.config import DeepstackVisionConfig
from trainer.models.registry import family_of, published_sizes

PERIOD = 1_000_003  # a prime: no row, block or head is like another
SIZES = published_sizes()


def write_model(folder: Path, size: ModelConfig) -> None:
    """Write a Hugging Face folder of one layer with other bits in every tensor."""
    vision = size.vision
    deepstack = isinstance(vision, DeepstackVisionConfig)
    (tiny_qwen3_vl_folder if deepstack else tiny_vl_folder if vision else tiny_text_folder)(folder)
    values = json.loads((folder / "config.json").read_text())
    text = values.get("text_config", values)
    text |= {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "layer_types": ["full_attention"],
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
    shapes = TensorShapes.of(folder, config, family_of(config).table(config)).hf
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (PERIOD,), generator=generator, dtype=torch.int16) & ~0x4000  # all finite
    with HFWriter(folder, [Planned(name, shape, torch.bfloat16) for name, shape in shapes.items()]) as writer:
        for number, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            drawn = bits.roll(number * 7919).repeat(-(-count // PERIOD))[:count]
            writer.add(name, drawn.view(torch.bfloat16).view(shape))


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is gone after the test: pytest would keep 70 GB of three runs."""
    yield tmp_path / "scratch"
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", SIZES)
def test_there_and_back(scratch: Path, name: str) -> None:
    size = SIZES[name]
    write_model(scratch / "hf", size)
    config = ModelConfig.from_hf(str(scratch / "hf"))
    one_layer = replace(size, num_layers=1, vocab_size=config.vocab_size, vision=None)
    for field in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "qk_norm", "qkv_bias"):
        assert getattr(config, field) == getattr(one_layer, field), field
    to_megatron(scratch / "hf", scratch / "megatron")
    to_hf(str(scratch / "megatron"), scratch / "back")
    before, after = (safe_open(scratch / folder / "model.safetensors", "pt") for folder in ("hf", "back"))
    assert set(before.keys()) == set(after.keys())
    for key in before.keys():  # noqa: SIM118 - not a mapping
        assert torch.equal(bits_of(before, key), bits_of(after, key)), key
    loader: Any = transformers.AutoModelForImageTextToText if size.vision else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(transformers.AutoConfig.from_pretrained(scratch / "hf"))
    head = 1 if size.tied else 0  # in transformers' state_dict, not in the file
    assert len(before.keys()) == len(model.state_dict()) - head


def bits_of(file: Any, key: str) -> Tensor:
    tensor: Tensor = file.get_tensor(key)
    return tensor.view(torch.int16)
