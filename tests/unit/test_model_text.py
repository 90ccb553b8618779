"""Qwen2.5 and Qwen3 on packs against transformers on each sample alone, in float32 on a CPU."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kanyun.errors import UserError
from tests.support.model_golden import batch_of, examples, gradient_errors, load, transformers_answer
from tests.support.qwen3_assets import tiny_qwen3_folder
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder
from trainer.models.config import ModelConfig
from trainer.models.initialize import build_model, freeze
from trainer.models.language import LanguageModel
from trainer.models.qwen2_5.config import WindowedVisionConfig
from trainer.models.registry import family_of
from trainer.runtime import Runtime


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.start(seed=3) as started:
        yield started


@pytest.fixture(
    scope="module",
    params=[(make, tied) for make in (tiny_text_folder, tiny_qwen3_folder) for tied in (True, False)],
    ids=["Qwen2.5 tied", "Qwen2.5 untied", "Qwen3 tied", "Qwen3 untied"],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> tuple[Any, Any]:
    """Our model and transformers', with the same weights."""
    make, tied = request.param
    folder = make(tmp_path_factory.mktemp("text"), tied=tied)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = build_model(ModelConfig.from_hf(str(folder)), runtime)
    load(model, reference)
    return model, reference


@pytest.mark.parametrize(
    "lengths", [[(60, 1, 33, 2)], [(128,)], [(100, 20), (5, 123)]], ids=["tail", "full", "two packs"]
)
def test_each_segment_is_as_if_alone(pair: tuple[Any, Any], lengths: list[tuple[int, ...]]) -> None:
    model, reference = pair
    packs = [examples(model.model_config.vocab_size, *pack) for pack in lengths]
    logits = model.logits(batch_of(model.model_config, packs, length=128))
    assert logits.shape == (128 * len(packs), model.model_config.vocab_size)
    for row, pack in enumerate(packs):
        start = 128 * row
        for example in pack:
            expected, _ = transformers_answer(reference, example)
            assert expected.std() > 0.5
            torch.testing.assert_close(logits[start : start + len(expected)], expected, rtol=0, atol=2e-5)
            start += len(expected)


def test_loss_and_every_gradient(pair: tuple[Any, Any]) -> None:
    model, reference = pair
    pack = examples(model.model_config.vocab_size, 60, 1, 33, 2)
    batch = batch_of(model.model_config, [pack], length=128)
    total = model(batch)
    assert (total.dtype, total.shape) == (torch.float32, ())
    expected = sum(transformers_answer(reference, example)[1] for example in pack)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)

    model.zero_grad()
    reference.zero_grad()
    total.backward()
    expected.backward()
    errors = gradient_errors(model, reference)
    assert max(errors.values()) < 1e-5, errors


def test_empty_segments_change_nothing(pair: tuple[Any, Any]) -> None:
    """Static shapes repeat the last entry of cu_seqlens."""
    model, _ = pair
    batch = batch_of(model.model_config, [examples(model.model_config.vocab_size, 60, 40)], length=128)
    padded = torch.nn.functional.pad(batch.cu_seqlens, (0, 5), value=128)
    assert torch.equal(model(batch), model(replace(batch, cu_seqlens=padded)))


def test_checkpoint_names_are_those_of_fused_layers(pair: tuple[Any, Any]) -> None:
    """A checkpoint written on a CPU is read on a GPU, whose Transformer Engine layers hold the norms."""
    model, _ = pair
    keys = {tensor.key for tensor in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()}
    assert "language.decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "language.decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in keys
    assert ("language.output_layer.weight" in keys) is not model.model_config.tied
    assert keys == {row.megatron for row in family_of(model.model_config).table(model.model_config)}
    assert len(keys) == len(list(model.parameters()))


def test_weights_load_strictly(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(weights)
    del weights["language.decoder.final_layernorm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*final_layernorm\.weight"):
        model.load_state_dict(weights)


def test_initial_weights(pair: tuple[Any, Any], runtime: Runtime) -> None:
    config = replace(pair[0].model_config, initializer_range=0.05)

    def weights(seed: int) -> dict[str, torch.Tensor]:
        return dict(build_model(config, replace(runtime, seed=seed)).named_parameters())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, weight in first.items():
        if weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.05, rel=0.05), name
            assert abs(weight.mean().item()) < 0.003, name
            assert not torch.equal(weight, other[name]), name
        else:
            assert torch.equal(weight, torch.zeros_like(weight) if name.endswith("bias") else torch.ones_like(weight))
    assert not torch.equal(*(first[f"language.decoder.layers.{n}.mlp.linear_fc2.weight"] for n in range(2)))


def test_same_batch_same_bits(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    batch = batch_of(model.model_config, [examples(model.model_config.vocab_size, 60, 40)], length=128)
    runs = []
    for _ in range(2):
        model.zero_grad()
        loss = model(batch)
        loss.backward()
        runs.append([loss, *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_text_model_has_one_part(pair: tuple[Any, Any]) -> None:
    freeze(pair[0], "language")
    assert all(parameter.requires_grad for parameter in pair[0].parameters())
    with pytest.raises(UserError, match="'vision' is no part of this model: all, or some of language"):
        freeze(pair[0], "vision")


def test_tensor_parallelism_must_divide_the_model(pair: tuple[Any, Any], runtime: Runtime) -> None:
    with pytest.raises(UserError, match="tensor parallelism 4 does not divide the model's 2 key/value heads"):
        LanguageModel(pair[0].model_config, replace(runtime, tensor_parallel=4))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 as transformers 4 wrote it, and as the hub's Qwen2.5-VL has it."""
    text = config.pop("text_config", {})
    rope = text.pop("rope_parameters", None) or config.pop("rope_parameters")
    config |= {key: value for key, value in text.items() if key not in ("model_type", "architectures", "dtype")}
    config["rope_theta"] = rope["rope_theta"]
    if "mrope_section" in rope:
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    return config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [tiny_text_folder, tiny_qwen3_folder, tiny_vl_folder])
def test_config_is_read_in_both_layouts(tmp_path: Path, make: Any, tied: bool) -> None:
    folder = make(tmp_path, tied=tied)
    new = ModelConfig.from_hf(str(folder))
    file = folder / "config.json"
    file.write_text(json.dumps(flat(json.loads(file.read_text()))))
    theirs = transformers.AutoConfig.from_pretrained(folder)  # from the flat file
    assert ModelConfig.from_hf(str(folder)) == new

    text = theirs.get_text_config()
    assert new.tied == tied == theirs.tie_word_embeddings
    assert new.rope_theta == text.rope_parameters["rope_theta"] == 1e6
    assert (new.num_layers, new.num_heads, new.num_kv_heads) == (2, text.num_attention_heads, text.num_key_value_heads)
    assert new.model_type == theirs.model_type
    assert new.head_dim == (32 if make is tiny_qwen3_folder else 16)
    assert (new.qkv_bias, new.qk_norm) == ((False, True) if make is tiny_qwen3_folder else (True, False))
    assert (new.vocab_size, new.hidden_size, new.intermediate_size) == (text.vocab_size, 64, text.intermediate_size)
    assert (new.norm_eps, new.max_positions) == (text.rms_norm_eps, text.max_position_embeddings)
    if make is tiny_vl_folder:
        assert list(new.mrope_section) == text.rope_parameters["mrope_section"]
        assert new.image_token_id == theirs.image_token_id
        assert isinstance(new.vision, WindowedVisionConfig)
        assert new.vision.image_mean == (0.48145466, 0.4578275, 0.40821073)
        assert isinstance(new.vision, WindowedVisionConfig)
        assert new.vision.full_attention_blocks == tuple(theirs.vision_config.fullatt_block_indexes)
        assert (new.vision.depth, new.vision.num_heads) == (theirs.vision_config.depth, theirs.vision_config.num_heads)
        assert new.vision.out_hidden_size == new.hidden_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "unheard_of"},
            r"is a 'unheard_of' model: give one of qwen2 \(Qwen2\.5\), .*, qwen3 \(Qwen3\).* or \w+ \([\w.-]+\)$",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has sliding-window attention"),
        (
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None},
            "has sliding-window attention",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "has rope scaling 'yarn'"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
    ],
)
def test_refused_configs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tiny_text_folder(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(str(tmp_path))


def test_biases_that_no_released_qwen3_has_are_refused(tmp_path: Path) -> None:
    file = tiny_qwen3_folder(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_bias": True}))
    with pytest.raises(UserError, match="has attention_bias"):
        ModelConfig.from_hf(str(tmp_path))


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        ModelConfig.from_hf(str(tmp_path))
