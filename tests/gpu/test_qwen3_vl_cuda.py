"""What only Qwen3-VL has, on a GPU: deepstack through recomputed layers, its towers' real widths in fp8."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from tests.support.cuda_golden import in_ddp, losses_of_graphs
from tests.support.model_golden import batch_of, load
from tests.support.qwen3_vl_assets import tiny_qwen3_vl_folder
from tests.support.vision_golden import LENGTH, PACKS, example
from trainer.data.batch import Batch
from trainer.data.shapes import StaticShape
from trainer.models.config import BFLOAT16, Compute, ModelConfig
from trainer.models.initialize import build_model
from trainer.models.registry import published_sizes
from trainer.runtime import Runtime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STATIC = StaticShape(16, (1600, 3200), {"images": 16})


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.start() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three decoder layers, two of which are given a block of the tower."""
    return tiny_qwen3_vl_folder(tmp_path_factory.mktemp("vl"), min_pixels=32 * 32, vision_hidden_size=4 * 64)


def batch(config: ModelConfig, folder: Any, name: str) -> Batch:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return batch_of(config, [[example(processor, *sample) for sample in pack] for pack in PACKS[name]], LENGTH, STATIC)


def run(model: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = in_ddp(model)(batch)
    loss.backward()
    return loss.item(), {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_recomputed_layers_hand_deepstack_on(folder: Any, runtime: Runtime, layers: int, fp8: bool) -> None:
    config, results = ModelConfig.from_hf(str(folder)), []
    reference = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to("cuda")
    images = batch(config, folder, "odd sizes").to(runtime.device)
    for compute in (Compute(fp8), Compute(fp8, recomputed_layers=layers, recomputed_blocks=4)):
        model = build_model(config, runtime, compute=compute)
        load(model, reference)
        results.append(run(model, images))
    (loss, gradients), (again_loss, again) = results
    assert again_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (again[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-6, name


def test_one_graph_of_recomputed_and_offloaded_layers_serves_other_images(folder: Any, runtime: Runtime) -> None:
    config = ModelConfig.from_hf(str(folder))
    model = build_model(config, runtime, compute=Compute(recomputed_layers=1, recomputed_blocks=2, offloaded_layers=1))
    names = [name for name, packs in PACKS.items() if len(packs) == 1]
    losses = losses_of_graphs(model, [batch(config, folder, name) for name in names], runtime)
    assert len({round(loss, 2) for loss in losses}) == len(losses)


@pytest.mark.parametrize("size", ["Qwen3-VL-4B", "Qwen3-VL-8B"])
def test_the_released_towers_in_fp8(size: str, folder: Any, runtime: Runtime) -> None:
    """Heads of 64 and of 72 channels, 4096 and 4304 neurons, mergers of 4 x 1024 and 4 x 1152 channels."""
    tiny, tower = ModelConfig.from_hf(str(folder)), published_sizes()[size].vision
    assert tower is not None
    blocks = {"depth": 3, "deepstack_blocks": (0, 1), "out_hidden_size": tiny.hidden_size}
    config = replace(tiny, vision=replace(tower, **blocks))
    results = []
    for compute in (BFLOAT16, Compute(fp8=True)):
        model = build_model(config, runtime, compute=compute)
        results.append(run(model, batch(config, folder, "largest").to(runtime.device)))
    (loss, gradients), (fp8_loss, fp8_gradients) = results
    assert fp8_loss == pytest.approx(loss, rel=0.02)
    assert fp8_loss != loss
    for name, gradient in gradients.items():
        if name.startswith("vision.") and name.endswith("weight") and gradient.dim() == 2:
            assert torch.cosine_similarity(fp8_gradients[name].flatten(), gradient.flatten(), dim=0) > 0.9, name
