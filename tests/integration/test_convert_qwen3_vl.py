"""Qwen3-VL through conversion and training: other depths, heads and deepstack blocks than any released model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from convert.logits import compare
from convert.resize_vocab import resize_vocab
from convert.to_hf import to_hf
from convert.to_megatron import to_megatron
from kanyun.errors import UserError
from tests.support.qwen3_vl_assets import OTHER_TOWER, tiny_qwen3_vl_folder
from tests.support.training_job import train, write_job
from trainer.models.config import ModelConfig

WEIGHTS = "model.safetensors"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "one deepstack block": {"deepstack": (3,), "layers": 1},
    "none": {"deepstack": ()},
    "more deepstack blocks than layers, not in order": {"deepstack": (2, 0, 3), "layers": 2, "tied": False},
    "other sizes of tower and tokens": {"tower": OTHER_TOWER | {"depth": 6}, "deepstack": (1, 4, 5), "layers": 4},
}


def qwen3_vl(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    tiny_qwen3_vl_folder(folder, seed=5, **options)
    if dtype != torch.float32:
        rewrite(folder, {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()})
        edit_config(folder, dtype=str(dtype).removeprefix("torch."))
    return folder


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change a setting where it is: in the vision tower's part, else in the decoder's, else at the root."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        parts = [config["vision_config"], config["text_config"], config]
        parts = parts[1:] if name == "rope_parameters" else parts  # the vision tower has some too
        next(part for part in parts if name in part)[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back_is_bit_exact(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = qwen3_vl(tmp_path / "hf", dtype, **ARCHITECTURES[name])
    to_megatron(source, tmp_path / "megatron")
    to_hf(str(tmp_path / "megatron"), tmp_path / "back")
    assert_same_weights(source, tmp_path / "back")
    for file in source.iterdir():
        if file.name != WEIGHTS:
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_our_model_and_transformers_have_the_same_logits(tmp_path: Path, name: str) -> None:
    source = qwen3_vl(tmp_path / "hf", **ARCHITECTURES[name])
    to_megatron(source, tmp_path / "megatron")
    sample, comparison = compare(source, tmp_path / "megatron")
    assert len(sample.images) == 1
    assert comparison.first.std() > 0.5  # logits that say something
    assert comparison.difference.max() <= 1e-4
    assert comparison.agreement == 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_other_layout_of_names_is_read_and_the_published_one_written(tmp_path: Path, tied: bool) -> None:
    """Names as Qwen2.5-VL has them; the tied model holds its head twice."""
    source, other = qwen3_vl(tmp_path / "hf", tied=tied), qwen3_vl(tmp_path / "other", tied=tied)
    tensors = load_file(source / WEIGHTS)
    assert {name.split(".")[1] for name in tensors} == {"language_model", "visual", *(() if tied else ("weight",))}
    moved = {
        name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1): tensor
        for name, tensor in tensors.items()
    }
    if tied:
        moved["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    rewrite(other, moved)
    to_megatron(other, tmp_path / "megatron")
    to_hf(str(tmp_path / "megatron"), tmp_path / "back")
    assert_same_weights(source, tmp_path / "back")

    if tied:
        moved["lm_head.weight"][3, 5] += 1
        rewrite(other, moved)
        with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.language_model\.embed_tokens"):
            to_megatron(other, tmp_path / "refused")


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_added_for_a_tokenizers_new_tokens(tmp_path: Path, tied: bool) -> None:
    source = qwen3_vl(tmp_path / "hf", tied=tied)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    rows = json.loads((source / "config.json").read_text())["text_config"]["vocab_size"]
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": rows + 2, "content": "<new>"})
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    added = resize_vocab(source, tmp_path / "more")
    weights = load_file(tmp_path / "more" / WEIGHTS)
    assert (rows + added) % 128 == 0
    assert weights["model.language_model.embed_tokens.weight"].shape == (rows + added, 64)
    assert weights["model.visual.pos_embed.weight"].shape == (36, 64)
    to_megatron(tmp_path / "more", tmp_path / "megatron")


@pytest.mark.parametrize("at_root", [True, False])
def test_the_root_of_config_json_alone_ties_head_and_embedding(tmp_path: Path, at_root: bool) -> None:
    """Unlike Qwen2.5-VL's, where the decoder's part may say so, too."""
    source = qwen3_vl(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": at_root}
    config["text_config"]["tie_word_embeddings"] = not at_root
    (source / "config.json").write_text(json.dumps(config))
    assert transformers.AutoConfig.from_pretrained(source).tie_word_embeddings == at_root
    assert ModelConfig.from_hf(str(source)).tied == at_root


def test_trains_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    values = write_job(tmp_path, images=True, make_model=tiny_qwen3_vl_folder) | {"keep_last": 2}
    whole = train(values)
    assert whole[-1]["loss"] < whole[0]["loss"]
    checkpoints = tmp_path / "out" / "checkpoints"
    (checkpoints / "latest").write_text("step_00000003\n")
    shutil.rmtree(checkpoints / "step_00000006")
    assert [line["loss"] for line in train(values)] == [line["loss"] for line in whole]
    to_hf(values["output"], tmp_path / "trained")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")
    before = load_file(Path(values["model"]) / WEIGHTS)["model.visual.deepstack_merger_list.0.linear_fc2.weight"]
    assert not torch.equal(model.model.visual.deepstack_merger_list[0].linear_fc2.weight, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "has attention_bias, which this trainer does not implement"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e6}}, "has rope scaling 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": False}},
            "has mrope_interleaved false",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}},
            r"has mrope_section \[24, 20, 20\], which are not whole numbers whose sum is half of head_dim 32",
        ),
        ({"num_position_embeddings": 35}, "has 35 num_position_embeddings, which is no square"),
        ({"deepstack_visual_indexes": [1, 4]}, r"\[1, 4\], which are not distinct blocks of 4"),
        ({"deepstack_visual_indexes": [1, 1]}, r"\[1, 1\], which are not distinct blocks of 4"),
        ({"hidden_act": "gelu"}, "'gelu', which this trainer does not implement"),
    ],
)
def test_options_that_released_models_do_not_use_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = qwen3_vl(tmp_path / "hf")
    edit_config(source, **changes)
    with pytest.raises(UserError, match=message):
        to_megatron(source, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
