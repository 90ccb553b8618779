"""FLOPs of a step, against a count by hand and against what torch counts in transformers' model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kanyun.schema import Pack
from tests.support.packed_data import encoded_image
from tests.support.qwen3_vl_assets import tiny_qwen3_vl_folder
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder
from trainer.data.batch import Batch, BatchFormat, make_batch
from trainer.data.shapes import StaticShape
from trainer.models.config import ModelConfig
from trainer.models.registry import costs_of

TEXT = ModelConfig(
    model_type="qwen2",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    max_positions=64,
    norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(1, 0, 0),
    qkv_bias=True,
    qk_norm=False,
    tied=True,
    initializer_range=0.02,
    image_token_id=None,
    vision=None,
)


def batch_of(ids: list[int], segments: list[int], form: BatchFormat, grids: list[list[int]] | None = None) -> Batch:
    rng = np.random.default_rng(0)
    grids = grids or []
    pack = Pack(
        pack_id=0,
        input_ids=np.array(ids, np.int32),
        loss_mask=np.ones(len(ids), bool),
        cu_seqlens=np.cumsum([0, *segments]).astype(np.int32),
        sample_ids=np.arange(len(segments), dtype=np.uint64),
        dataset=["made"] * len(segments),
        image_grid_thw=np.array(grids, np.int32).reshape(-1, 3),
        images=[encoded_image(rng, 14 * width, 14 * height) for _, height, width in grids],
    )
    return make_batch([pack], form)


def test_a_text_model_counted_by_hand() -> None:
    # A layer: q 8x8, k and v 8x4 each, output 8x8, gate, up and down 8x16 each = 576 products; 3 layers; head 8x100.
    assert costs_of(TEXT).token_flops == 2 * (3 * (64 + 32 + 32 + 64 + 3 * 128) + 800) == 5056
    # Two tokens that meet: 2 channels x 4 heads, once for the score and once for the output.
    assert costs_of(TEXT).pair_flops == 3 * 2 * 2 * 8 == 96
    # Segments of 3 and 5 tokens have 1+2+3 and 1+2+3+4+5 pairs; as one segment they would have 36.
    batch = batch_of([1] * 8, [3, 5], BatchFormat(None))
    assert costs_of(TEXT).forward_flops(batch) == 8 * 5056 + (6 + 15) * 96
    assert costs_of(TEXT).pack_cost.pair * 8**2 == 32 * 96  # without the 1 / 2 of the diagonal
    assert costs_of(TEXT).pack_cost.patch == 0


def test_text_as_torch_counts_transformers(tmp_path: Path) -> None:
    import transformers

    folder = tiny_text_folder(tmp_path, tied=False)
    config, n = ModelConfig.from_hf(str(folder)), 50
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.arange(n)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    rope = 2 * config.head_dim // 2 * n  # transformers makes its angles by a matrix product
    ours = costs_of(config).forward_flops(batch_of(ids[0].tolist(), [n], BatchFormat(None)))
    skipped_by_causality = (
        n * (n - 1) // 2 * costs_of(config).pair_flops
    )  # eager attention computes them and throws them away
    assert counter.get_total_flops() == ours + skipped_by_causality + rope


@pytest.mark.parametrize("make", [tiny_vl_folder, tiny_qwen3_vl_folder])
def test_images_as_torch_counts_transformers(make: Any, tmp_path: Path) -> None:
    """Windows that are cut off by the border, blocks with full attention, the mergers."""
    import transformers

    folder = make(tmp_path)
    config = ModelConfig.from_hf(str(folder))
    vision, image = config.vision, config.image_token_id
    assert vision is not None
    assert image is not None
    grids = [[1, 10, 20], [1, 4, 2]]
    ids = [1, *[image] * 50, 2, *[image] * 2, 3]
    form = BatchFormat.of(config)
    batch = batch_of(ids, [len(ids)], form, grids)
    text_only = batch_of([1] * len(ids), [len(ids)], form)
    ours = costs_of(config).forward_flops(batch) - costs_of(config).forward_flops(text_only)

    tower = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").model.visual
    frame = 3 * vision.patch_size**2  # values of a patch
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.zeros(208, 2 * frame), grid_thw=torch.tensor(grids))
    second_frame = 208 * 2 * frame * vision.hidden_size  # equal to the first in an image: ours reads one
    assert counter.get_total_flops() == ours + second_frame

    # Padding to a static shape is no work of the model.
    static = StaticShape(8, (512,), {"windows": 32, "images": 8})
    padded = batch_of(ids, [len(ids)], BatchFormat(form.geometry, image, static), grids)
    assert costs_of(config).forward_flops(padded) == costs_of(config).forward_flops(batch)
