"""Qwen3 through conversion and training: other layers and heads than any released model, real programs, made tiny."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from convert.logits import compare
from convert.to_hf import to_hf
from convert.to_megatron import to_megatron
from kanyun.errors import UserError
from tests.support.qwen3_assets import tiny_qwen3_folder
from tests.support.training_job import train, write_job

WEIGHTS = "model.safetensors"


def qwen3(folder: Path, *, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
    tiny_qwen3_folder(folder, tied=tied, layers=3, seed=5)
    if dtype != torch.float32:
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_bit_exact(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    source = qwen3(tmp_path / "hf", tied=tied, dtype=dtype)
    to_megatron(source, tmp_path / "megatron")
    to_hf(str(tmp_path / "megatron"), tmp_path / "back")
    assert_same_weights(source, tmp_path / "back")
    names = load_file(source / WEIGHTS)
    assert "model.layers.2.self_attn.q_norm.weight" in names
    assert not any(name.endswith(".bias") for name in names)
    for file in source.iterdir():
        if file.name != WEIGHTS:
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("tied", [True, False])
def test_our_model_and_transformers_have_the_same_logits(tmp_path: Path, tied: bool) -> None:
    source = qwen3(tmp_path / "hf", tied=tied)
    to_megatron(source, tmp_path / "megatron")
    _, comparison = compare(source, tmp_path / "megatron")
    assert comparison.first.std() > 0.5  # logits that say something
    assert comparison.difference.max() <= 1e-4
    assert comparison.agreement == 1


def test_a_tied_head_that_the_files_hold_all_the_same(tmp_path: Path) -> None:
    """As in released Qwen3 models with tied embeddings."""
    plain = qwen3(tmp_path / "plain", tied=True)
    twice = tmp_path / "twice"
    shutil.copytree(plain, twice)
    tensors = load_file(plain / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / WEIGHTS, metadata={"format": "pt"})
    to_megatron(twice, tmp_path / "megatron")
    to_hf(str(tmp_path / "megatron"), tmp_path / "back")
    assert_same_weights(plain, tmp_path / "back")

    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, twice / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        to_megatron(twice, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_trains_and_goes_on_from_a_checkpoint(tmp_path: Path, tied: bool) -> None:
    def make_model(folder: Path) -> Path:
        return tiny_qwen3_folder(folder, tied=tied)

    values: dict[str, Any] = write_job(tmp_path, images=False, make_model=make_model) | {"keep_last": 2}
    whole = train(values)
    assert whole[-1]["loss"] < whole[0]["loss"]
    checkpoints = tmp_path / "out" / "checkpoints"
    (checkpoints / "latest").write_text("step_00000003\n")
    shutil.rmtree(checkpoints / "step_00000006")
    resumed = train(values)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    to_hf(values["output"], tmp_path / "trained")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
