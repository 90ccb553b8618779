"""Image models on GPU: patches padded to a static shape, heads of 80 and 72 channels, against transformers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from tests.support.cuda_golden import in_ddp, losses_of_graphs
from tests.support.model_golden import assert_as_near, batch_of, load
from tests.support.qwen3_vl_assets import tiny_qwen3_vl_folder
from tests.support.qwen_assets import tiny_vl_folder
from tests.support.vision_golden import LENGTH, PACKS, example, kept
from tests.support.window_golden import differences
from trainer.data.batch import Batch
from trainer.data.shapes import StaticShape
from trainer.models.config import Compute, ModelConfig
from trainer.models.initialize import build_model, freeze
from trainer.models.qwen2_5.vision import GatedMLP
from trainer.runtime import Runtime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STATIC = StaticShape(16, (3200,), {"windows": 160, "images": 16})


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.start() as started:
        yield started


FAMILIES = {"qwen2_5_vl": (tiny_vl_folder, 80), "qwen3_vl": (tiny_qwen3_vl_folder, 72)}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    make, width = FAMILIES[request.param]
    return make(tmp_path_factory.mktemp("vl"), min_pixels=28 * 28, vision_hidden_size=4 * width)


@pytest.fixture(scope="module")
def references(folder: Any) -> list[Any]:
    """Return transformers' model in float32 and in bfloat16."""
    auto = transformers.AutoModelForImageTextToText
    return [auto.from_pretrained(folder, dtype=t).to("cuda") for t in (torch.float32, torch.bfloat16)]


@pytest.fixture
def model(folder: Any, references: list[Any], runtime: Runtime) -> Any:
    made = build_model(ModelConfig.from_hf(str(folder)), runtime)
    load(made, references[0])
    return made


@pytest.fixture(scope="module")
def packs(folder: Any) -> dict[str, Any]:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return {name: [[example(processor, *s) for s in pack] for pack in packs] for name, packs in PACKS.items()}


def static_batch(model: Any, packs: Any) -> Batch:
    return batch_of(model.model_config, packs, LENGTH, STATIC)


@pytest.mark.parametrize("name", PACKS)
def test_as_near_to_float32_as_transformers_is(
    name: str, model: Any, references: list[Any], packs: dict[str, Any], runtime: Runtime
) -> None:
    batch = static_batch(model, packs[name]).to(runtime.device)
    exact, rounded = references
    assert_as_near(in_ddp(model), exact, rounded, packs[name], batch)


@pytest.mark.parametrize("width", [80, 32])
def test_attention_in_windows(width: int, runtime: Runtime) -> None:
    """Within the rounding of bfloat16, 2^-8."""
    windows = [64] * 20 + [1, 5, 63, 0, 32, 0, 0]
    like = torch.empty(0, device=runtime.device, dtype=torch.bfloat16)
    found = differences(windows, 64, heads=16, width=width, like=like)
    assert all(difference < 2**-7 for difference in found), found  # so is no NaN


@pytest.mark.parametrize("name", PACKS)
def test_loss_in_a_pack_is_the_loss_alone(name: str, model: Any, packs: dict[str, Any], runtime: Runtime) -> None:
    batches = [static_batch(model, packs[name])]
    batches += [batch_of(model.model_config, [[sample]], LENGTH) for pack in packs[name] for sample in pack]
    with torch.no_grad():
        together, *alone = (model(batch.to(runtime.device)).item() for batch in batches)
    assert together == pytest.approx(sum(alone), rel=2e-3)


def test_one_graph_serves_other_images(model: Any, packs: dict[str, Any], runtime: Runtime) -> None:
    """A graph that baked in the first batch's windows, images or positions would be wrong on the others; and some
    batches are padded to fewer patches, each with its own graph in the same memory.
    """
    sizes = replace(STATIC, patches=(1600, 3200))
    chosen = [packs[name] for name in packs if len(packs[name]) == 1]
    batches = [batch_of(model.model_config, pack, LENGTH, sizes) for pack in chosen for _ in range(2)]
    assert {len(batch.vision.patches) for batch in batches} == {1600, 3200}
    losses = losses_of_graphs(model, batches, runtime)[::2]
    assert len({round(loss) for loss in losses}) == len(losses)


def test_recomputed_and_offloaded_layers_and_blocks_change_nothing(
    folder: Any, references: list[Any], packs: dict[str, Any], runtime: Runtime
) -> None:
    results = []
    for fp8 in (False, True):
        for compute in (Compute(fp8), Compute(fp8, recomputed_layers=1, recomputed_blocks=3, offloaded_layers=1)):
            made = build_model(ModelConfig.from_hf(str(folder)), runtime, compute=compute)
            load(made, references[0])
            ddp = in_ddp(made)
            loss = ddp(static_batch(made, packs["odd sizes"]).to(runtime.device))
            loss.backward()
            results.append((loss.item(), {name: p.main_grad.clone() for name, p in made.named_parameters()}))
    for (loss, gradients), (again_loss, again) in (results[:2], results[2:]):
        assert again_loss == pytest.approx(loss, rel=1e-3)
        for name, gradient in gradients.items():
            assert (again[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-6, name
    assert results[2][0] == pytest.approx(results[0][0], rel=0.03)  # fp8
    assert results[2][0] != results[0][0]


def test_frozen_blocks_have_no_backward_pass(model: Any, packs: dict[str, Any], runtime: Runtime) -> None:
    batch = static_batch(model, packs["odd sizes"]).to(runtime.device)
    freeze(model, "language")
    assert kept(model.vision, batch) == 0
    freeze(model, "language+merger")
    mergers = 1 + len(getattr(model.model_config.vision, "deepstack_blocks", ()))
    assert 2 * mergers < kept(model.vision, batch) < 5 * mergers


@pytest.mark.parametrize("trainable", ["language", "vision", "merger", "language+merger"])
def test_frozen_parts_have_no_gradient(
    trainable: str, model: Any, packs: dict[str, Any], runtime: Runtime, references: list[Any]
) -> None:
    """And the others have the one that they have when all parts train."""
    batch = static_batch(model, packs["odd sizes"]).to(runtime.device)
    in_ddp(model)(batch).backward()
    whole = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    part = build_model(model.model_config, runtime, trainable=trainable)
    load(part, references[0])
    in_ddp(part)(batch).backward()
    tower = ("vision.blocks.", "vision.patch_embed.", "vision.position_embed.")
    parts = {"language": "language.", "vision": tower, "merger": "vision.merger."}
    for name, parameter in part.named_parameters():
        assert hasattr(parameter, "main_grad") is any(name.startswith(parts[p]) for p in trainable.split("+")), name
        if hasattr(parameter, "main_grad"):
            assert (parameter.main_grad - whole[name]).norm() <= 0.02 * whole[name].norm() + 1e-6, name


def test_padded_neurons_stay_zero(model: Any, packs: dict[str, Any], runtime: Runtime) -> None:
    if not isinstance(model.vision.blocks[0].mlp, GatedMLP):
        pytest.skip("only Qwen2.5-VL pads its neurons")
    in_ddp(model)(static_batch(model, packs["odd sizes"]).to(runtime.device)).backward()
    for block in model.vision.blocks:
        rows = block.mlp.gate_up.weight.main_grad.unflatten(0, (2, 128)).abs().sum((0, 2))
        columns = block.mlp.down.weight.main_grad.abs().sum(0)
        for neurons in (rows, columns):
            assert neurons.gt(0).tolist() == [True] * 84 + [False] * 44
