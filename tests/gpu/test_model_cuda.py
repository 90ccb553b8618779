"""The CUDA path (Transformer Engine, bfloat16): as near to transformers in float32 as transformers in bfloat16 is."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from tests.support.cuda_golden import in_ddp, losses_of_graphs
from tests.support.model_golden import (
    assert_as_near,
    batch_of,
    examples,
    expected_tensors,
    gradients,
    load,
    moved,
    transformers_answer,
)
from tests.support.qwen3_assets import tiny_qwen3_folder
from tests.support.qwen3_vl_assets import tiny_qwen3_vl_folder
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder
from tests.support.vision_golden import PACKS, example
from trainer.models.config import ModelConfig
from trainer.models.initialize import build_model
from trainer.models.layers import SegmentAttention
from trainer.models.registry import family_of
from trainer.runtime import Runtime

pytest.importorskip("trainer.models.layers_te", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTH = 512


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.start() as started:
        yield started


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [tiny_text_folder, tiny_qwen3_folder])
def test_as_near_to_float32_as_transformers_is(make: Any, tied: bool, runtime: Runtime, tmp_path: Any) -> None:
    folder = make(tmp_path, tied=tied)
    auto = transformers.AutoModelForCausalLM
    exact, rounded = (auto.from_pretrained(folder, dtype=t).to("cuda") for t in (torch.float32, torch.bfloat16))
    model = build_model(ModelConfig.from_hf(str(folder)), runtime)
    load(model, exact)
    pack = examples(model.model_config.vocab_size, 200, 1, 150, 33)
    assert_as_near(
        in_ddp(model), exact, rounded, [pack], batch_of(model.model_config, [pack], LENGTH).to(runtime.device)
    )


@pytest.mark.parametrize("kind", ["tied", "untied", "qwen3", "vision", "qwen3_vl"])
def test_float32_agrees_with_transformers(kind: str, runtime: Runtime, tmp_path: Any) -> None:
    """Transformer Engine's layers in float32, around torch's attention: cuDNN's takes 16-bit numbers only.

    Transformer Engine multiplies float32 in TF32, which has 10 bits of 23.
    """
    makers = {"qwen3": tiny_qwen3_folder, "vision": tiny_vl_folder, "qwen3_vl": tiny_qwen3_vl_folder}
    folder, images = makers.get(kind, tiny_text_folder)(tmp_path, tied=kind == "tied"), kind in ("vision", "qwen3_vl")
    auto = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    reference = auto.from_pretrained(folder, dtype=torch.float32).to("cuda")
    model = build_model(ModelConfig.from_hf(str(folder)), replace(runtime, dtype=torch.float32))
    for layer in model.language.decoder.layers:
        layer.self_attention.core_attention = SegmentAttention(model.config)
    load(model, reference)
    if images:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        pack = [example(processor, *sample) for sample in PACKS["odd sizes"][0]]
    else:
        pack = examples(model.model_config.vocab_size, 200, 1, 150, 33)
    batch = batch_of(model.model_config, [pack], 640).to(runtime.device)
    samples = [moved(sample, runtime.device) for sample in pack]
    expected = [transformers_answer(reference, sample) for sample in samples]
    with torch.no_grad():
        logits = model.logits(batch)[: sum(len(answer) for answer, _ in expected)]
    assert relative(logits, torch.cat([answer for answer, _ in expected])) < 2e-3
    total, true = in_ddp(model)(batch), sum(loss for _, loss in expected)
    assert total.item() == pytest.approx(true.item(), rel=1e-4)
    total.backward()
    true.backward()
    for name, gradient in expected_tensors(model, gradients(reference)).items():
        assert relative(model.get_parameter(name).main_grad, gradient) < 0.01, name


@pytest.mark.parametrize("make", [tiny_text_folder, tiny_vl_folder])
def test_the_loss_of_each_token_is_that_of_its_logits(make: Any, runtime: Runtime, tmp_path: Any) -> None:
    model = build_model(ModelConfig.from_hf(str(make(tmp_path))), runtime)
    pack = examples(model.model_config.vocab_size, 200, 1, 150, 33)
    batch = batch_of(model.model_config, [pack], LENGTH).to(runtime.device)
    seen: list[torch.Tensor] = []
    in_ddp(model)(batch, seen.append).backward()
    with torch.no_grad():
        total, logits = model(batch), model.logits(batch).float()
    (losses,) = seen
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none") * batch.loss_mask
    assert not losses.requires_grad
    assert ((losses == 0) == (batch.loss_mask == 0)).all()
    assert losses.sum().item() == pytest.approx(total.item(), rel=1e-4)
    assert torch.allclose(losses, expected, rtol=0.02, atol=0.02)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("make", [tiny_vl_folder, tiny_qwen3_folder, tiny_qwen3_vl_folder])
def test_checkpoint_names_are_those_of_the_table(make: Any, runtime: Runtime, tmp_path: Any) -> None:
    model = build_model(ModelConfig.from_hf(str(make(tmp_path))), runtime)
    keys = {tensor.key for tensor in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()}
    table = family_of(model.model_config).table(model.model_config)
    assert keys == {row.megatron for row in table}


@pytest.mark.parametrize("make", [tiny_text_folder, tiny_qwen3_folder])
def test_graph_captured_on_one_batch_is_right_on_another(make: Any, runtime: Runtime, tmp_path: Any) -> None:
    """Other tokens, other segments: a graph that baked in the first batch's would give the first batch's loss."""
    model = build_model(ModelConfig.from_hf(str(make(tmp_path))), runtime)
    batches = [
        batch_of(model.model_config, [examples(model.model_config.vocab_size, *lengths)], LENGTH)
        for lengths in ((200, 1, 150, 33), (64, 64, 300), (512,))
    ]
    first, *others = losses_of_graphs(
        model,
        [
            replace(b, cu_seqlens=torch.nn.functional.pad(b.cu_seqlens, (0, 8 - len(b.cu_seqlens)), value=LENGTH))
            for b in batches
        ],
        runtime,
    )
    assert all(abs(loss - first) > 0.01 * first for loss in others)
