"""What conversion refuses, each in one sentence: damaged and incomplete models, outputs that are there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.logits import compare
from convert.to_hf import to_hf
from convert.to_megatron import to_megatron
from kanyun.errors import UserError
from tests.support.convert_folders import WEIGHTS, edit_config, hf_model
from tests.support.odd_folders import forget_digests


def test_missing_and_left_over_tensors_are_named(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf", vision=False)
    tensors = load_file(source / WEIGHTS)
    norm = "model.layers.1.post_attention_layernorm.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != norm}, source / WEIGHTS)
    with pytest.raises(UserError, match=rf"{norm} is missing"):
        to_megatron(source, tmp_path / "megatron")
    save_file(tensors | {"model.layers.2.extra.weight": torch.zeros(1)}, source / WEIGHTS)
    with pytest.raises(UserError, match=r"model\.layers\.2\.extra\.weight is left over"):
        to_megatron(source, tmp_path / "megatron")
    save_file(tensors | {"model.layers.0.self_attn.k_proj.weight": torch.zeros(64, 64)}, source / WEIGHTS)
    with pytest.raises(UserError, match=r"k_proj\.weight has shape \[64, 64\], by config.json \[32, 64\]"):
        to_megatron(source, tmp_path / "megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]  # nothing half-written

    save_file(tensors, source / WEIGHTS)
    to_megatron(source, tmp_path / "megatron")
    stored = tmp_path / "megatron/checkpoints/step_00000000/hf"
    forget_digests(stored.parent)
    edit_config(stored, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"language\.output_layer\.weight is missing"):
        to_hf(str(tmp_path / "megatron"), tmp_path / "back")
    edit_config(stored, tie_word_embeddings=True, num_hidden_layers=1, layer_types=None)
    with pytest.raises(UserError, match=r"language\.decoder\.layers\.1\.[\w.]+ .*are left over"):
        to_hf(str(tmp_path / "megatron"), tmp_path / "back")


def test_an_output_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    source, out = hf_model(tmp_path / "hf", vision=False), tmp_path / "megatron"
    out.mkdir()  # an empty folder is as good as none
    to_megatron(source, out)
    (out / "leftover").write_text("of the first conversion")
    with pytest.raises(UserError, match=r"megatron exists: .* --overwrite"):
        to_megatron(source, out)
    to_megatron(source, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["checkpoints"]
    with pytest.raises(UserError, match="holds the input"):
        to_megatron(source, tmp_path, overwrite=True)


@pytest.mark.parametrize("out", ["run", "run/checkpoints", "run/checkpoints/step_00000004", "copy"])
def test_what_a_run_has_trained_is_not_replaced(tmp_path: Path, out: str) -> None:
    source = hf_model(tmp_path / "hf", vision=False)
    for run in ("run", "copy"):  # the copy is one of the checkpoints alone
        (tmp_path / run / "checkpoints/step_00000004").mkdir(parents=True)
        (tmp_path / run / "checkpoints/step_00000004/state.json").write_text("{}")
    (tmp_path / "run/run.json").write_text("{}")
    with pytest.raises(UserError, match=f"/{out} holds checkpoints of a training run, which no conversion replaces"):
        to_megatron(source, tmp_path / out, overwrite=True)
    assert (tmp_path / "run/checkpoints/step_00000004/state.json").exists()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    to_megatron(hf_model(tmp_path / "hf", vision=False), tmp_path / "megatron")
    step = tmp_path / "megatron/checkpoints/step_00000000"
    whole = (step / "__0_0.distcp").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (step / "__0_0.distcp").write_bytes(flipped)
    with pytest.raises(UserError, match=r"__0_0\.distcp is damaged \(its digest is"):
        to_hf(str(step), tmp_path / "back")
    for name in ("__0_0.distcp", ".metadata"):
        kept = (step / name).read_bytes()
        (step / name).write_bytes(kept[:500])
        with pytest.raises(UserError, match=rf"{name} has 500 bytes instead of"):
            to_hf(str(step), tmp_path / "back")
        (step / name).write_bytes(kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf", vision=False)
    edit_config(source, model_type="unheard_of")
    refused = {
        "config.json": (tmp_path, tmp_path / "out"),
        "'unheard_of' model: give one of qwen2 (Qwen2.5), qwen2_5_vl": (source, tmp_path / "out"),
    }
    for sentence, (given, out) in refused.items():
        with pytest.raises(UserError) as error:
            to_megatron(given, out)
        assert sentence in str(error.value)
    edit_config(source, model_type="qwen2")
    (source / WEIGHTS).write_bytes(b"not a model")
    with pytest.raises(UserError, match="cannot be read"):
        to_megatron(source, tmp_path / "out")
    (source / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        to_megatron(source, tmp_path / "out")
    with pytest.raises(UserError, match="is a Hugging Face folder, no checkpoint: `python -m convert to-megatron"):
        to_hf(str(source), tmp_path / "out")
    text, vision = (hf_model(tmp_path / name, vision=name == "b") for name in "ab")
    with pytest.raises(UserError, match=r"a text model .* a vision model"):
        compare(text, vision)
