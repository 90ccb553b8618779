"""Every published size there and back, bit for bit: its real tensor shapes, with one layer and a small vocabulary.

The vocabulary is the test tokenizer's: with the real 152,064 rows of 8,192 channels a 72B's two embeddings alone would
be 5 GB. Rows of an embedding are copied whatever their number is. The largest model here has 2 GB of weights.
"""

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

from convert.to_hf import to_hf
from convert.to_megatron import to_megatron
from tests.support.random_models import write_model
from trainer.models.config import ModelConfig
from trainer.models.registry import published_sizes

SIZES = published_sizes()


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
