"""Conversion there and back, bit for bit; both programs' logits; what stops it. Real models, made tiny."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.checks import TensorShapes
from convert.hf_weights import HFWeights
from convert.hf_writer import HFWriter, Planned
from convert.logits import compare
from convert.megatron_weights import MegatronWeights
from convert.to_hf import to_hf
from convert.to_megatron import to_megatron
from kanyun.errors import UserError
from kanyun.storage import Folder
from tests.support.convert_folders import WEIGHTS, convert, edit_config, hf_model, same
from tests.support.odd_folders import forget_digests
from tests.support.processes import run_ranks
from tests.support.qwen_assets import save_random
from tests.support.training_job import train, write_job
from trainer import checkpoint
from trainer.checkpoint.metadata import encode_metadata, read_metadata
from trainer.checkpoint.reader import load
from trainer.checkpoint.saver import save
from trainer.models.config import ModelConfig
from trainer.models.initialize import build_model
from trainer.models.registry import family_of
from trainer.runtime import Runtime

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vision", [True, False])
def test_there_and_back_is_bit_exact(tmp_path: Path, vision: bool, tied: bool, dtype: str) -> None:
    source = hf_model(tmp_path / "hf", vision=vision, tied=tied, dtype=dtype)
    to_megatron(source, tmp_path / "megatron")
    to_hf(str(tmp_path / "megatron"), tmp_path / "back")
    same(load_file(source / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS))
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == names
    for name in names:
        if name != WEIGHTS:
            assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


def test_the_nested_layout_is_read_and_the_layout_of_transformers_written(tmp_path: Path) -> None:
    plain = hf_model(tmp_path / "plain", vision=True, tied=False)
    nested = hf_model(tmp_path / "nested", vision=True, tied=False, nested=True)
    to_megatron(nested, tmp_path / "megatron")
    to_hf(str(tmp_path / "megatron" / "checkpoints" / "step_00000000"), tmp_path / "back")
    same(load_file(plain / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS))


def test_weights_keep_their_dtype_when_config_json_names_another(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf", vision=False)
    edit_config(source, dtype="bfloat16")
    to_megatron(source, tmp_path / "megatron")
    to_hf(str(tmp_path / "megatron"), tmp_path / "back")
    same(load_file(source / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS))


@pytest.mark.parametrize("vision", [True, False])
def test_transformers_loads_all_of_it(tmp_path: Path, vision: bool) -> None:
    source = hf_model(tmp_path / "hf", vision=vision, nested=vision)
    to_megatron(source, tmp_path / "megatron")
    to_hf(str(tmp_path / "megatron"), tmp_path / "back")
    loader: Any = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    model, info = loader.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = loader.from_pretrained(source)
    same(original.state_dict(), model.state_dict())
    processor: Any = transformers.AutoProcessor if vision else transformers.AutoTokenizer
    text = "<|im_start|>user\nHello<|im_end|>"
    mine, theirs = (processor.from_pretrained(folder) for folder in (tmp_path / "back", source))
    assert type(mine) is type(theirs)
    assert mine(text=[text])["input_ids"] == theirs(text=[text])["input_ids"]
    assert mine.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith("Hi<|im_end|>\n")


@pytest.mark.parametrize(("vision", "tied"), [(True, False), (False, True)])
def test_our_model_and_transformers_have_the_same_logits(tmp_path: Path, vision: bool, tied: bool) -> None:
    source = hf_model(tmp_path / "hf", vision=vision, tied=tied)
    to_megatron(source, tmp_path / "megatron")
    sample, found = compare(source, tmp_path / "megatron")
    assert len(sample.images) == vision
    assert found.first.std() > 0.5  # logits that say something
    assert found.difference.max() <= 1e-4
    assert found.agreement == 1


def test_a_trained_checkpoint_is_rounded_to_the_configs_dtype(tmp_path: Path) -> None:
    values = write_job(tmp_path, images=True)
    edit_config(Path(values["model"]), dtype="bfloat16")
    train(values | {"steps": 2, "save_every": 1})
    to_hf(values["output"], tmp_path / "back")
    written, config = load_file(tmp_path / "back" / WEIGHTS), ModelConfig.from_hf(values["model"])
    trained = MegatronWeights(checkpoint.resolve(values["output"]))
    for row in family_of(config).table(config):
        assert trained[row.megatron].dtype == torch.float32
        parts = row.transform.to_hf(trained[row.megatron], config)
        same({name: part.bfloat16() for name, part in zip(row.hf, parts)}, {name: written[name] for name in row.hf})
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_converted_model_starts_training_and_a_run_of_many_processes_converts(tmp_path: Path, ranks: int) -> None:
    """Weights that tensor parallel ranks saved in pieces are the ones that were loaded."""
    source = hf_model(tmp_path / "hf", vision=ranks == 2, tied=False)
    if ranks == 8:
        config = transformers.AutoConfig.from_pretrained(source, num_attention_heads=ranks, num_key_value_heads=ranks)
        save_random(transformers.AutoModelForCausalLM.from_config(config), source, seed=1)
    to_megatron(source, tmp_path / "megatron")
    folders = (str(tmp_path / "megatron"), str(tmp_path / "split"))
    run_ranks(ranks, "-m", "tests.integration.test_convert", *folders)
    step = tmp_path / "split/checkpoints/step_00000000"
    assert {file.name.split("_")[2] for file in step.glob("*.distcp")} == {str(r) for r in range(ranks)}  # __RANK_N
    to_hf(str(tmp_path / "split"), tmp_path / "back")
    same(load_file(source / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS))

    # A table of contents that lacks one rank's pieces, in a checkpoint made before digests were.
    records = [record for record in read_metadata(Folder(str(step))) if not record.file.startswith("__1_")]
    (step / ".metadata").write_bytes(encode_metadata(records))
    forget_digests(step)
    with pytest.raises(UserError, match=r"step_00000000 does not hold every piece of language\."):
        to_hf(str(tmp_path / "split"), tmp_path / "again")


def load_and_save_in_pieces(source: str, output: str) -> None:
    with Runtime.start(tensor_parallel=int(os.environ["WORLD_SIZE"]), seed=3) as runtime:
        step = checkpoint.resolve(source)
        model = build_model(ModelConfig.from_hf((step / "hf").path), runtime)
        load(step, model)
        save(Folder(output), checkpoint.read_state(step), model, None, step / "hf")


def test_large_models_are_written_in_files_with_an_index(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf", vision=False)
    tensors = load_file(source / WEIGHTS)
    split = tmp_path / "split"
    shutil.copytree(source, split)
    (split / WEIGHTS).unlink()
    planned = [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with HFWriter(split, planned, source, shard_bytes=100_000) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.add(name, tensor)
    files = sorted(split.glob("*.safetensors"))
    assert len(files) > 3
    assert [path.name for path in files][-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert all(sum(t.nbytes for t in load_file(path).values()) <= max(largest, 100_000) for path in files)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    same(transformers.AutoModelForCausalLM.from_pretrained(split).state_dict(), reference_state(source))
    config = ModelConfig.from_hf(str(split))
    read, rows = HFWeights(split, config), family_of(config).table(config)
    read.require(rows, TensorShapes.of(split, config, rows).hf)
    same({name: read.read(name)[0].clone() for name in tensors}, tensors)


def reference_state(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def test_command_line(tmp_path: Path) -> None:
    source, megatron, back = hf_model(tmp_path / "hf", vision=True), tmp_path / "megatron", tmp_path / "back"
    for arguments in (("to-megatron", source, megatron), ("to-hf", megatron, back), ("verify", source, megatron)):
        done = convert(*arguments)
        assert done.returncode == 0, done.stderr
    assert "same most likely token at 100.00% of the positions" in done.stdout

    refused = convert("to-hf", megatron, back)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--overwrite" in refused.stderr
    assert "Traceback" not in refused.stderr

    weights = load_file(back / WEIGHTS)
    weights["model.layers.1.self_attn.o_proj.weight"] *= 1.01
    save_file(weights, back / WEIGHTS, metadata={"format": "pt"})
    differs = convert("verify", megatron, back)
    assert differs.returncode == 1
    assert "OVER the tolerance of 0.0001" in differs.stdout


if __name__ == "__main__":
    load_and_save_in_pieces(*sys.argv[1:])
