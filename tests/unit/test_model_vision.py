"""Qwen2.5-VL and Qwen3-VL on packs against transformers on single samples: float32 on a CPU, from encoded images on."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers

from kanyun.errors import UserError
from tests.support.model_golden import batch_of, gradient_errors, load, transformers_answer
from tests.support.qwen3_vl_assets import OTHER_TOWER, tiny_qwen3_vl_folder
from tests.support.qwen_assets import tiny_vl_folder
from tests.support.vision_golden import LENGTH, PACKS, example, kept
from trainer.data.shapes import StaticShape
from trainer.models.config import Compute, ModelConfig
from trainer.models.initialize import build_model, freeze
from trainer.models.qwen2_5.vision import GatedMLP
from trainer.runtime import Runtime


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.start() as started:
        yield started


FOLDERS = {
    "qwen2_5_vl": tiny_vl_folder,
    "qwen3_vl": tiny_qwen3_vl_folder,
    "qwen3_vl of other sizes": partial(
        tiny_qwen3_vl_folder, tower=OTHER_TOWER, deepstack=(3, 0, 1), layers=2, tied=False, max_pixels=150 * 24 * 24
    ),
}


@pytest.fixture(scope="module", params=FOLDERS)
def trio(request: Any, tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> tuple[Any, Any, Any]:
    """Our model and transformers', with the same weights, and transformers' processor."""
    folder = FOLDERS[request.param](tmp_path_factory.mktemp("vl"), min_pixels=28 * 28)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = build_model(ModelConfig.from_hf(str(folder)), runtime)
    load(model, reference)
    return model, reference, transformers.AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", PACKS)
def test_each_sample_is_as_if_alone(trio: tuple[Any, Any, Any], name: str) -> None:
    model, reference, processor = trio
    packs = [[example(processor, *sample) for sample in pack] for pack in PACKS[name]]
    logits = model.logits(batch_of(model.model_config, packs, LENGTH))
    for row, pack in enumerate(packs):
        start = row * LENGTH
        for sample in pack:
            expected, _ = transformers_answer(reference, sample)
            torch.testing.assert_close(logits[start : start + len(expected)], expected, rtol=0, atol=5e-5)
            start += len(expected)


@pytest.mark.parametrize("name", [name for name, packs in PACKS.items() if len(packs) == 1])
def test_loss_and_every_gradient(trio: tuple[Any, Any, Any], name: str) -> None:
    model, reference, processor = trio
    freeze(model, "all")
    pack = [example(processor, *sample) for sample in PACKS[name][0]]
    batch = batch_of(model.model_config, [pack], LENGTH)
    total = model(batch)
    expected = sum(transformers_answer(reference, sample)[1] for sample in pack)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)

    model.zero_grad()
    reference.zero_grad()
    total.backward()
    expected.backward()
    errors = gradient_errors(model, reference)
    assert max(errors.values()) < 5e-5, errors


@pytest.mark.parametrize("name", PACKS)
def test_loss_in_a_pack_is_the_loss_alone(trio: tuple[Any, Any, Any], name: str) -> None:
    """Also where patches are padded to a static shape, as on a GPU."""
    model, _, processor = trio
    packs = [[example(processor, *sample) for sample in pack] for pack in PACKS[name]]
    static = StaticShape(16, (3456,), {"windows": 170, "images": 16})  # 6 x 16 x lcm(4, 9): patches of 16 tokens
    with torch.no_grad():
        alone = [model(batch_of(model.model_config, [[sample]], LENGTH)).item() for pack in packs for sample in pack]
        assert min(alone) > 1
        for shape in (None, static):
            together = model(batch_of(model.model_config, packs, LENGTH, shape)).item()
            assert together == pytest.approx(sum(alone), rel=1e-6)


def test_pixels_reach_only_their_own_sample(trio: tuple[Any, Any, Any]) -> None:
    model, _, processor = trio
    pack = [example(processor, "a", (112, 112)), example(processor, "b", (84, 140)), example(processor, "c")]
    batch = batch_of(model.model_config, [pack], LENGTH)
    assert batch.vision is not None
    patches = batch.vision.patches.clone()
    patches[:64] = 255 - patches[:64]  # the first image
    changed = model.logits(replace(batch, vision=replace(batch.vision, patches=patches))) - model.logits(batch)
    first = len(pack[0].input_ids)
    assert changed[:first].abs().max() > 0.1
    assert torch.equal(changed[first:], torch.zeros_like(changed[first:]))


def test_text_only_pack_still_runs_the_tower(trio: tuple[Any, Any, Any]) -> None:
    """Every rank reduces the tower's gradients in every step: here they are there, and zero."""
    model, _, processor = trio
    freeze(model, "all")
    batch = batch_of(model.model_config, [[example(processor, "No image at all.")]], LENGTH)
    model.zero_grad()
    model(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().sum().item() == 0) is name.startswith("vision."), name


@pytest.mark.parametrize(
    ("trainable", "prefixes"),
    [
        ("all", ("language.", "vision.")),
        ("language", ("language.",)),
        ("vision", ("vision.patch_embed.", "vision.position_embed.", "vision.blocks.")),
        ("merger", ("vision.merger.",)),
        ("language+merger", ("language.", "vision.merger.")),
    ],
)
def test_trainable_parts(trio: tuple[Any, Any, Any], trainable: str, prefixes: tuple[str, ...]) -> None:
    """Frozen parts have no gradient, the others the one that they have when all parts train."""
    model, _, processor = trio
    batch = batch_of(model.model_config, [[example(processor, "What is this?", (112, 84))]], LENGTH)
    gradients = []
    for parts in ("all", trainable):
        freeze(model, parts)
        model.zero_grad()
        model(batch).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    freeze(model, "all")
    for name, gradient in gradients[1].items():
        assert (gradient is not None) is name.startswith(prefixes), name
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_blocks_have_no_backward_pass(trio: tuple[Any, Any, Any]) -> None:
    model, _, processor = trio
    batch = batch_of(model.model_config, [[example(processor, "What is this?", (112, 84))]], LENGTH)
    freeze(model, "language")
    assert kept(model.vision, batch) == 0
    freeze(model, "language+merger")
    mergers = 1 + len(getattr(model.model_config.vision, "deepstack_blocks", ()))
    assert 2 * mergers < kept(model.vision, batch) < 5 * mergers  # the norm's input and output, both sides of gelu
    freeze(model, "all")
    assert kept(model.vision, batch) > 4 * 7


def test_unknown_part(trio: tuple[Any, Any, Any]) -> None:
    with pytest.raises(UserError, match=r"'viison' is no part of this model: all, or some of language\+vision\+merger"):
        freeze(trio[0], "language+viison")


def test_recomputed_layers_and_blocks_change_nothing(trio: tuple[Any, Any, Any], runtime: Runtime) -> None:
    model, _, processor = trio
    freeze(model, "all")
    batch = batch_of(model.model_config, [[example(processor, *sample) for sample in PACKS["odd sizes"][0]]], LENGTH)
    again = build_model(model.model_config, runtime, compute=Compute(recomputed_layers=1, recomputed_blocks=3))
    again.load_state_dict(model.state_dict())
    runs = []
    for each in (model, again):
        each.zero_grad()
        loss = each(batch)
        loss.backward()
        runs.append([loss, *(parameter.grad for parameter in each.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert kept(again.vision, batch) < kept(model.vision, batch) / 2


def test_initial_weights(trio: tuple[Any, Any, Any], runtime: Runtime) -> None:
    config = trio[0].model_config
    config = replace(config, vision=replace(config.vision, initializer_range=0.07))
    model = build_model(config, runtime)
    assert model.vision.patch_embed.weight.std().item() == pytest.approx(0.07, rel=0.02)
    assert model.vision.merger.fc2.weight.std().item() == pytest.approx(0.07, rel=0.05)
    assert model.language.decoder.layers[0].mlp.linear_fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.vision.merger.norm.weight, torch.ones(64))
    assert torch.equal(model.vision.blocks[0].attn.qkv.bias, torch.zeros(192))
    if isinstance(mlp := model.vision.blocks[0].mlp, GatedMLP):  # 84 neurons, padded to 128
        assert mlp.gate_up.weight.unflatten(0, (2, 128)).abs().sum((0, 2)).gt(0).tolist() == [True] * 84 + [False] * 44
        assert mlp.down.weight.abs().sum(0).gt(0).tolist() == [True] * 84 + [False] * 44
