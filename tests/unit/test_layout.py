"""The planner: which layout a run gets, and what it says where nothing fits."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanyun.errors import UserError
from trainer.models.config import Compute, ModelConfig
from trainer.models.registry import costs_of, published_sizes
from trainer.planning import planner
from trainer.planning.exchange import exposed, whole_exchange
from trainer.planning.gpus import GPUS, find_gpu
from trainer.planning.memory import MemoryModel
from trainer.planning.planner import Layout, LayoutPlanner
from trainer.planning.speed import SpeedModel

SIZES = published_sizes()


def plan(model: ModelConfig, gpus: int, gpu: str, length: int, global_batch: int, patches: int = 0) -> Layout:
    return LayoutPlanner(model, GPUS[gpu], gpus).plan(length=length, global_batch=global_batch, patches=patches)


def peak_memory(
    model: ModelConfig, tensor_parallel: int, data_parallel: int, tokens: int, patches: int, compute: Compute
) -> float:
    return MemoryModel(model).peak(
        tensor_parallel=tensor_parallel, data_parallel=data_parallel, tokens=tokens, patches=patches, compute=compute
    )


@pytest.mark.parametrize(
    ("size", "parameters"),  # as the models' pages on the hub give them, safetensors without tied heads
    [
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen2.5-3B", 3_085_938_688),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Qwen2.5-VL-3B", 3_754_622_976),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-1.7B", 1_720_574_976),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-14B", 14_768_307_200),
        ("Qwen3-32B", 32_762_123_264),
        ("Qwen3-VL-2B", 2_127_532_032),
        ("Qwen3-VL-4B", 4_437_815_808),
        ("Qwen3-VL-8B", 8_767_123_696),
        ("Qwen3-VL-32B", 33_357_390_064),
    ],
)
def test_parameters_are_counted_right(size: str, parameters: int) -> None:
    assert costs_of(SIZES[size]).parameters == parameters


def test_a_ring_between_nodes_uses_the_network_cards_of_all_gpus_that_take_part() -> None:
    """7B's gradients and weights, 4 + 2 bytes a parameter: 45.7 GB over a node's 350 GB/s, or one card's 45."""
    whole, split = (sum(whole_exchange(7.616e9 / size, gpus=64, tensor_parallel=size, node=8)) for size in (1, 8))
    assert whole == pytest.approx(7.616e9 * 6 * 63 / 64 / 350e9, rel=0.01)
    assert split == pytest.approx(7.616e9 / 8 * 6 * 7 / 8 / 45e9, rel=0.01)


def test_micro_batch_is_the_largest_that_fits_and_divides() -> None:
    chosen = [plan(SIZES["Qwen2.5-0.5B"], gpus, "H100", 8192, batch) for gpus, batch in ((1, 32), (1, 12), (8, 8))]
    assert [layout.micro_batch for layout in chosen] == [8, 4, 1]
    assert plan(SIZES["Qwen2.5-1.5B"], 1, "H100", 8192, 32).micro_batch == 2


def test_precision_follows_gpu_and_size() -> None:
    assert plan(SIZES["Qwen2.5-1.5B"], 1, "H100", 8192, 32).compute.fp8
    assert not plan(replace(SIZES["Qwen2.5-0.5B"], hidden_size=512), 1, "H100", 8192, 32).compute.fp8
    assert not plan(SIZES["Qwen2.5-1.5B"], 1, "A100", 8192, 32).compute.fp8


def test_vision_blocks_are_recomputed_where_they_do_not_fit() -> None:
    """VL-3B on 18,816 patches (6 images of 784 x 784): a block keeps 41 kB a patch, all of them 25 GB."""
    model = SIZES["Qwen2.5-VL-3B"]
    text, vision, recomputed = (
        peak_memory(model, 1, 8, 8192, patches, Compute(recomputed_blocks=blocks))
        for patches, blocks in ((0, 0), (18_816, 0), (18_816, 32))
    )
    assert vision - text == pytest.approx(1.05 * 18_816 * 32 * 2 * (8 * 1280 + 3 * 3456), rel=0.01)
    assert recomputed - text == pytest.approx(1.05 * 18_816 * 2 * (32 * 1280 + 8 * 1280 + 3 * 3456), rel=0.10)
    assert plan(model, 8, "H200", 8192, 8, 18_816).compute.recomputed_blocks == 0
    layout = plan(model, 1, "H100", 8192, 8, 18_816)
    assert layout.micro_batch == 1
    assert 0 < layout.compute.recomputed_blocks <= 32
    assert f"recompute {layout.compute.recomputed_blocks} of 32 vision blocks" in layout.reason


def test_layers_are_offloaded_and_recomputed_where_they_do_not_fit() -> None:
    """3B on one H100: weights, gradients and optimizer state are 40 GB, a layer keeps 1.3 GB of 16,384 tokens."""
    model = SIZES["Qwen2.5-3B"]
    layout = plan(model, 1, "H100", 16_384, 16)
    assert layout.micro_batch == 1
    assert 0 < layout.compute.recomputed_layers < 18
    fewer = replace(layout.compute, recomputed_layers=layout.compute.recomputed_layers - 1)
    assert layout.memory is not None
    assert layout.memory <= GPUS["H100"].usable < peak_memory(model, 1, 1, 16_384, 0, fewer)
    assert f"recompute {layout.compute.recomputed_layers} of 36 layers" in layout.reason
    offloaded = layout.compute.offloaded_layers
    assert offloaded == SpeedModel(model, GPUS["H100"]).offloadable(layout.compute) > 0
    assert f"SwiGLU's inputs of {offloaded} layers offloaded to the host" in layout.reason
    without = replace(layout.compute, offloaded_layers=0)
    saved = peak_memory(model, 1, 1, 16_384, 0, without) - layout.memory
    assert saved == pytest.approx(1.05 * offloaded * 16_384 * 2 * 2 * 11_008)


def test_no_more_is_offloaded_than_the_host_has_memory_for() -> None:
    planner = LayoutPlanner(SIZES["Qwen2.5-3B"], GPUS["H100"], 1, host_memory=3 * 16_384 * 2 * 2 * 11_008)
    layout = planner.plan(length=16_384, global_batch=16)
    assert layout.compute.offloaded_layers == 3


@pytest.mark.parametrize("size", sorted(SIZES))
def test_half_of_the_layers_that_are_not_recomputed_are_offloaded_at_most(size: str) -> None:
    """What is copied back while recomputed layers free nothing has a place that other layers have left."""
    model = SIZES[size]
    for recomputed in range(model.num_layers + 1):
        compute = Compute(fp8=True, recomputed_layers=recomputed)
        offloaded = SpeedModel(model, GPUS["H100"]).offloadable(compute)
        assert 0 <= 2 * offloaded <= model.num_layers - recomputed


def test_a_model_is_split_where_it_must_be() -> None:
    assert plan(SIZES["Qwen2.5-7B"], 8, "H100", 8192, 64).weight_shards == 8
    with pytest.raises(
        UserError, match=r"needs 104 GB and has 81 usable, 23 GB are missing; 2 are the fewest that can"
    ):
        plan(SIZES["Qwen2.5-7B"], 1, "H100", 8192, 64)


def test_gpu_is_found_by_cudas_name_for_it() -> None:
    assert find_gpu("NVIDIA H100 80GB HBM3").name == "H100"
    with pytest.raises(UserError, match=r"the GPU is a 'Tesla T4', and layouts are known for H100, H200, A100"):
        find_gpu("Tesla T4")


@pytest.mark.parametrize(
    ("size", "gpu", "gpus", "patches", "layout"),
    [
        ("Qwen2.5-0.5B", "H100", 1, 0, (1, 8, 0, 0, 0, "66.9")),
        ("Qwen2.5-7B", "H100", 8, 0, (1, 2, 0, 0, 0, "80.5")),
        ("Qwen2.5-72B", "H100", 64, 0, (1, 4, 79, 0, 0, "78.9")),
        ("Qwen2.5-VL-3B", "H100", 1, 6_272, (1, 1, 0, 0, 6, "80.4")),
        ("Qwen2.5-VL-7B", "H200", 1, 18_816, (1, 1, 0, 28, 8, "142.0")),
        ("Qwen3-0.6B", "H100", 1, 0, (1, 4, 0, 0, 0, "53.2")),
        ("Qwen3-8B", "H100", 8, 0, (1, 2, 0, 0, 13, "80.7")),
        ("Qwen3-32B", "H100", 64, 0, (1, 2, 60, 0, 2, "80.3")),
        ("Qwen3-VL-2B", "H100", 1, 9_216, (1, 2, 0, 0, 0, "77.1")),
        ("Qwen3-VL-4B", "H100", 1, 9_216, (1, 1, 10, 24, 12, "80.1")),
        ("Qwen3-VL-8B", "H100", 8, 9_216, (1, 1, 0, 0, 0, "66.2")),
        ("Qwen3-VL-32B", "H100", 64, 9_216, (1, 2, 63, 27, 0, "79.9")),
    ],
)
def test_layouts_stay(size: str, gpu: str, gpus: int, patches: int, layout: tuple[Any, ...]) -> None:
    """Of packs of 8192, 16 a GPU: tensor-parallel size, packs, recomputed layers and blocks, offloaded layers, GB."""
    chosen = plan(SIZES[size], gpus, gpu, 8192, 16 * gpus, patches)
    compute, memory = chosen.compute, f"{(chosen.memory or 0) / 1e9:.1f}"
    saved = compute.recomputed_layers, compute.recomputed_blocks, compute.offloaded_layers
    assert (chosen.tensor_parallel, chosen.micro_batch, *saved, memory) == layout


def test_a_qwen3_layer_keeps_query_key_and_value_once_more() -> None:
    """0.6B: 16 query heads and 8 key heads of 128 channels, 28 layers."""
    model = SIZES["Qwen3-0.6B"]
    plain = replace(model, qk_norm=False)
    with_norm, without = (peak_memory(m, 1, 1, 8192, 0, Compute()) for m in (model, plain))
    assert with_norm - without == pytest.approx(1.05 * 8192 * 28 * 2 * (16 + 2 * 8) * 128, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "gpus", "patches", "shards"),
    [
        ("Qwen2.5-72B", 16, 0, 16),
        ("Qwen2.5-VL-72B", 32, 16_384, 32),
        ("Qwen2.5-32B", 8, 0, 8),
        ("Qwen2.5-7B", 16, 0, 8),
        ("Qwen2.5-7B", 64, 0, 1),
        ("Qwen2.5-1.5B", 64, 0, 1),
    ],
)
def test_weights_are_sharded_where_that_is_fastest(size: str, gpus: int, patches: int, shards: int) -> None:
    """Over a node's GPUs, or over nodes where one has too little memory: 72B's state is 109 GB a GPU of one node."""
    planned = LayoutPlanner(SIZES[size], GPUS["H100"], gpus)
    first = planned.ranked(length=8192, global_batch=16 * gpus, patches=patches)[0]
    assert first.weight_shards == shards
    assert (f"sharded over {shards} GPUs" in first.reason) == (shards > 1)


def test_memory_of_sharded_weights() -> None:
    """7B on 8 GPUs: 12 bytes of a parameter, and 13 of a layer's in fp8; the vocabulary has 1.09 G of them."""
    model = SIZES["Qwen2.5-7B"]
    without = MemoryModel(model).peak(
        tensor_parallel=1, data_parallel=1, tokens=8192, patches=0, compute=Compute(fp8=True)
    ) - (13 * 7.616e9 - 1.09e9)
    found = MemoryModel(model).peak(
        tensor_parallel=1, data_parallel=8, tokens=8192, patches=0, compute=Compute(fp8=True), weight_shards=8
    )
    layers, layer = 7.616e9 - 1.09e9, (7.616e9 - 1.09e9) / 28
    expected = 13 * layers / 8 + 12 * 1.09e9 / 8 + (3 + 4 + 2 / 8) * layer
    logits = (
        2 * 8192 * (3 * model.hidden_size - 7 / 8 * model.vocab_size)
    )  # an eighth of the columns, all ranks' tokens
    assert found - without == pytest.approx(expected + logits, rel=0.01)


def test_runs_get_weights_that_are_sharded_over_a_node_or_two() -> None:
    assert plan(SIZES["Qwen2.5-1.5B"], 8, "H100", 8192, 128).weight_shards == 1
    for gpus in (2, 8, 16):
        assert plan(SIZES["Qwen2.5-7B"], gpus, "H100", 8192, 16 * gpus).weight_shards == min(gpus, 8)
    assert plan(SIZES["Qwen2.5-32B"], 8, "H100", 8192, 128).weight_shards == 8
    assert plan(SIZES["Qwen2.5-72B"], 16, "H100", 8192, 256).weight_shards == 16


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SIZES)), st.integers(1, 512), st.sampled_from(sorted(GPUS)), st.sampled_from([0, 16_384]))
def test_any_number_of_gpus_gets_layouts_that_fit_or_a_sentence(size: str, gpus: int, gpu: str, patches: int) -> None:
    model = SIZES[size]
    patches = patches if model.vision else 0
    try:
        found = LayoutPlanner(model, GPUS[gpu], gpus).ranked(length=8192, global_batch=16 * gpus, patches=patches)
    except UserError as error:
        assert " GB are missing; " in str(error)  # noqa: PT017
        return
    for layout in found:
        assert layout.memory is not None
        assert layout.step is not None
        assert layout.memory <= GPUS[gpu].usable
        assert gpus % (layout.tensor_parallel * layout.weight_shards) == 0
        assert layout.weight_shards % 8 == 0 or layout.weight_shards in (1, gpus)
        assert all(part >= 0 for part in layout.step)
        assert (layout.step.exchange > 0) == (gpus > 1)
    fastest = min(layout.step.seconds for layout in found if layout.step)
    assert found[0].step is not None
    assert found[0].step.seconds <= planner.MARGIN * fastest


def test_an_exchange_is_hidden_by_compute_but_for_the_part_that_always_costs() -> None:
    assert exposed(1.0, 10.0, 0.5) == 0.5
    assert exposed(10.0, 1.0, 0.5) == 9.5
    assert exposed(0.0, 1.0) == 0.0


def test_command_line_needs_no_gpu() -> None:
    command = [sys.executable, "-m", "trainer.layout", "--gpus"]
    fits = subprocess.run([*command, "8", "Qwen2.5-7B", "--top", "3"], capture_output=True, text=True)
    assert fits.returncode == 0, fits.stderr
    lines = fits.stdout.splitlines()
    header = lines[2].split()
    rows = [line.split() for line in lines[3:6]]
    assert [" ".join(row[1:4]).split(" 1 ")[0] for row in rows] == ["sharded over 8", "whole", "sharded over 8"]
    parts = len(header) - 1 - header.index("step")
    for row in rows:
        step, *split = map(float, row[-parts - 1 :])
        assert sum(split) == pytest.approx(step, abs=0.05)
    assert "A run gets 1." in lines
    assert "% slower than 1: exchange +" in fits.stdout
    modules = "import sys, trainer.layout as cli; sys.argv[1:] = ['Qwen3-8B', '--gpus', '8']; cli.main()"
    modules += "; print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", modules], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    too_few = subprocess.run([*command, "8", "Qwen2.5-72B"], capture_output=True, text=True)
    assert (too_few.returncode, too_few.stdout) == (2, "")
    assert "needs 121 GB and has 81 usable, 40 GB are missing; 16 are the fewest that can" in too_few.stderr
    unknown = subprocess.run([*command, "8", "Qwen2.5-9B"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "there is no model Qwen2.5-9B: give Qwen2.5-0.5B, " in unknown.stderr
    too_many = subprocess.run([*command, "1000", "Qwen2.5-7B"], capture_output=True, text=True)
    assert too_many.returncode == 2
    assert "1000 GPUs: layouts are known for 1 to 512" in too_many.stderr
