"""The CUDA path (Transformer Engine, bfloat16): as near to transformers in float32 as transformers in bfloat16 is."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from tests.model_golden import Example, batch_of, expected_tensors, load, transformers_answer
from tests.qwen_assets import tiny_text_folder, tiny_vl_folder
from tests.unit.test_model_text import examples
from tests.unit.test_model_vision import PACKS, example
from trainer.data.batch import Batch
from trainer.graph import Graphed
from trainer.model import ModelConfig, Qwen2_5, build_model
from trainer.runtime import Runtime

accumulate_in_place = pytest.importorskip("trainer.model.spec_te", exc_type=ImportError).accumulate_in_place
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTH = 512


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.start() as started:
        yield started


@pytest.mark.parametrize("kind", ["tied", "untied", "vision"])
def test_as_near_to_float32_as_transformers_is(kind: str, runtime: Runtime, tmp_path: Any) -> None:
    make = tiny_vl_folder if kind == "vision" else tiny_text_folder
    folder = make(tmp_path, tied=kind != "untied")
    auto = transformers.AutoModelForImageTextToText if kind == "vision" else transformers.AutoModelForCausalLM
    exact, rounded = (auto.from_pretrained(folder, dtype=t).to("cuda") for t in (torch.float32, torch.bfloat16))
    model = build_model(ModelConfig.from_hf(str(folder)), runtime)
    load(model, exact)
    config = model.model_config
    if kind == "vision":
        processor = transformers.AutoProcessor.from_pretrained(folder)
        pack = [example(processor, *sample) for sample in PACKS["odd sizes"][0]]
    else:
        pack = examples(config.vocab_size, 200, 1, 150, 33)
    batch = batch_of(config, [pack], LENGTH).to(runtime.device)

    logits, start = model.logits(batch), 0
    for sample in map(on_cuda, pack):
        expected = transformers_answer(exact, sample)[0]
        error = (logits[start : start + len(expected)] - expected).norm() / expected.norm()
        theirs = (transformers_answer(rounded, sample)[0] - expected).norm() / expected.norm()
        assert error < 1.5 * theirs < 0.2, f"{error:.4f} against {theirs:.4f}"
        start += len(expected)

    ddp = in_ddp(model)
    total = ddp(batch)
    losses = [sum(transformers_answer(other, on_cuda(sample))[1] for sample in pack) for other in (exact, rounded)]
    assert total.item() == pytest.approx(losses[0].item(), rel=0.01)
    for value in (total, *losses):
        value.backward()
    true, near = (
        expected_tensors(model, {name: weight.grad.float() for name, weight in other.named_parameters()})
        for other in (exact, rounded)
    )
    for name, expected in true.items():
        error = (model.get_parameter(name).main_grad - expected).norm() / expected.norm()
        theirs = (near[name] - expected).norm() / expected.norm()
        assert error < 1.5 * theirs + 0.01, f"{name}: {error:.4f} against {theirs:.4f}"


def test_checkpoint_names_are_those_of_the_cpu(runtime: Runtime, tmp_path: Any) -> None:
    model = build_model(ModelConfig.from_hf(str(tiny_vl_folder(tmp_path))), runtime)
    keys = {tensor.key for tensor in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()}
    assert "language.decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "language.decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in keys
    assert len(keys) == len(list(model.parameters()))  # and nothing else


def test_graph_captured_on_one_batch_is_right_on_another(runtime: Runtime, tmp_path: Any) -> None:
    """Other tokens, other segments: a graph that baked in the first batch's would give the first batch's loss."""
    model = build_model(ModelConfig.from_hf(str(tiny_text_folder(tmp_path))), runtime)
    ddp, total = in_ddp(model), torch.zeros((), device=runtime.device)

    def work(batch: Batch) -> None:
        loss = ddp(batch)
        loss.backward()
        total.add_(loss.detach())

    def run(step: Callable[[Batch], None], batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        total.zero_()
        ddp.zero_grad_buffer()
        step(batch)
        return total.item(), {name: p.main_grad.clone() for name, p in model.named_parameters()}

    batches = [
        batch_of(model.model_config, [examples(model.model_config.vocab_size, *lengths)], LENGTH)
        for lengths in ((200, 1, 150, 33), (64, 64, 300), (512,))
    ]
    first, *others = (
        replace(b, cu_seqlens=torch.nn.functional.pad(b.cu_seqlens, (0, 8 - len(b.cu_seqlens)), value=LENGTH))
        for b in batches
    )
    graph = Graphed(work, runtime.device)
    graph.prepare(first)
    captured, _ = run(graph, first)
    for batch in (first, *others):
        loss, gradients = run(graph, batch)
        expected, exact = run(work, batch.to(runtime.device))
        assert loss == pytest.approx(expected, rel=1e-3)
        assert batch is first or abs(loss - captured) > 0.01 * captured
        for name, gradient in exact.items():
            assert (gradients[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-6, name


def in_ddp(model: Qwen2_5) -> DistributedDataParallel:
    """As Trainer makes it: gradients are added up in main_grad, by the matrix products themselves."""
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(model.config, config, model)
    accumulate_in_place(model)
    return ddp


def on_cuda(sample: Example) -> Example:
    processed = {name: value.to("cuda") for name, value in sample.processed.items()}
    return Example(sample.input_ids.to("cuda"), sample.trained.to("cuda"), processed, sample.images, sample.grids)
