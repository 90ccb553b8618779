"""The table of names, without any model: every tensor has its place on both sides, and every transform its inverse."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.models.config import ModelConfig
from trainer.models.qwen2_5.config import WindowedVisionConfig
from trainer.models.qwen2_5.names import canonical, table
from trainer.models.qwen2_5.padding import VISION_DOWN, VISION_GATE_UP
from trainer.models.qwen3_vl.config import DeepstackVisionConfig
from trainer.models.registry import family_of, published_sizes
from trainer.models.transforms import GATE_UP, PATCH_EMBED, QKV

VISION = WindowedVisionConfig(
    depth=3,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=64,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    window_size=112,
    full_attention_blocks=(1,),
    initializer_range=0.02,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)
CONFIG = ModelConfig(
    model_type="qwen2_5_vl",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=512,
    norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(2, 3, 3),
    qkv_bias=True,
    qk_norm=False,
    tied=True,
    initializer_range=0.02,
    image_token_id=7,
    vision=VISION,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vision", [VISION, None])
@pytest.mark.parametrize("layers", [1, 3])
def test_every_name_occurs_once_on_each_side(tied: bool, vision: WindowedVisionConfig | None, layers: int) -> None:
    rows = table(replace(CONFIG, tied=tied, vision=vision, num_layers=layers))
    mine, theirs = [row.megatron for row in rows], list(chain.from_iterable(row.hf for row in rows))
    assert len(set(mine)) == len(mine)
    assert len(set(theirs)) == len(theirs)
    # A Qwen2.5 layer has 12 tensors, a vision block 12, the merger 5; around them embedding, norm, patches, head.
    assert len(theirs) == 12 * layers + 2 + (not tied) + (12 * 3 + 5 + 1 if vision else 0)
    assert len(mine) == 7 * layers + 2 + (not tied) + (10 * 3 + 5 + 1 if vision else 0)
    assert [canonical(name) for name in theirs] == theirs


@pytest.mark.parametrize("tied", [True, False])
def test_a_qwen3_layer_has_norms_of_query_and_key_and_no_bias(tied: bool) -> None:
    config = replace(CONFIG, model_type="qwen3", qkv_bias=False, qk_norm=True, vision=None, tied=tied)
    rows = family_of(config).table(config)
    mine, theirs = [row.megatron for row in rows], list(chain.from_iterable(row.hf for row in rows))
    assert len(set(mine)) == len(mine) == 8 * 2 + 2 + (not tied)
    assert len(set(theirs)) == len(theirs) == 11 * 2 + 2 + (not tied)
    assert "language.decoder.layers.1.self_attention.k_layernorm.weight" in mine
    assert not any("bias" in name for name in theirs)


_4B = published_sizes()["Qwen3-VL-4B"]
assert isinstance(_4B.vision, DeepstackVisionConfig)
QWEN3_VL = replace(_4B, num_layers=2, vision=replace(_4B.vision, depth=3, deepstack_blocks=(2, 0)))


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_vl_has_qwen3s_decoder_and_its_own_tower(tied: bool) -> None:
    config, family = replace(QWEN3_VL, tied=tied), family_of(QWEN3_VL)
    rows = family.table(config)
    mine, theirs = [row.megatron for row in rows], list(chain.from_iterable(row.hf for row in rows))
    # A block has 12 tensors, each of 3 mergers 6; around them patches, their bias, positions.
    assert len(set(mine)) == len(mine) == 3 + 12 * 3 + 6 * 3 + 8 * 2 + 2 + (not tied)
    assert len(set(theirs)) == len(theirs) == 3 + 12 * 3 + 6 * 3 + 11 * 2 + 2 + (not tied)
    assert family.copies(config) == ({"lm_head.weight": "model.language_model.embed_tokens.weight"} if tied else {})


@given(
    name=st.sampled_from([name for row in family_of(QWEN3_VL).table(replace(QWEN3_VL, tied=False)) for name in row.hf])
)
def test_both_layouts_of_qwen3_vl_have_the_same_canonical_name(name: str) -> None:
    flat = name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
    assert (flat == name) is (name == "lm_head.weight")
    assert family_of(QWEN3_VL).canonical(flat) == family_of(QWEN3_VL).canonical(name) == name


@given(name=st.sampled_from([name for row in table(replace(CONFIG, tied=False)) for name in row.hf]))
def test_both_layouts_of_qwen2_5_vl_have_the_same_canonical_name(name: str) -> None:
    nested = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
    nested = nested.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else nested
    assert canonical(nested) == name


@given(groups=st.integers(1, 4), repeats=st.integers(1, 4), half=st.integers(1, 4), bias=st.booleans())
def test_qkv_interleave_and_its_inverse(groups: int, repeats: int, half: int, bias: bool) -> None:
    heads, dim = groups * repeats, 2 * half
    config = replace(CONFIG, num_heads=heads, num_kv_heads=groups, head_dim=dim)
    width = () if bias else (3,)
    query, key, value = (torch.randn(count * dim, *width) for count in (heads, groups, groups))
    fused = QKV.to_megatron([query, key, value], config)
    for part, back in zip((query, key, value), QKV.to_hf(fused, config), strict=True):
        assert torch.equal(part, back)
    # Row by row, as megatron.core splits it: in group g come its query heads, then key head g, then value head g.
    for g in range(groups):
        block = fused.unflatten(0, (groups, repeats + 2, dim))[g]
        for r in range(repeats):
            assert torch.equal(block[r], query.unflatten(0, (heads, dim))[g * repeats + r])
        assert torch.equal(block[repeats], key.unflatten(0, (groups, dim))[g])
        assert torch.equal(block[repeats + 1], value.unflatten(0, (groups, dim))[g])


def test_qkv_refuses_heads_that_are_not_the_configs() -> None:
    query, key = torch.zeros(64, 64), torch.zeros(64, 64)  # 4 key heads, but the config says 2
    with pytest.raises(RuntimeError):
        QKV.to_megatron([query, key, key], CONFIG)


@given(rows=st.integers(1, 7), width=st.integers(1, 3))
def test_gate_and_up(rows: int, width: int) -> None:
    gate, up = torch.randn(rows, width), torch.randn(rows, width)
    fused = GATE_UP.to_megatron([gate, up], CONFIG)
    assert torch.equal(fused[:rows], gate)
    assert torch.equal(fused[rows:], up)
    assert all(map(torch.equal, GATE_UP.to_hf(fused, CONFIG), (gate, up)))


def test_neurons_of_the_vision_tower_are_padded_with_zeros() -> None:
    """48 to 64 here, 3420 to 3456 in Qwen2.5-VL-3B."""
    gate, up, down, bias = torch.randn(48, 32), torch.randn(48, 32), torch.randn(32, 48), torch.randn(48)
    fused = VISION_GATE_UP.to_megatron([gate, up], CONFIG)
    assert fused.shape == (128, 32)
    assert torch.equal(fused[:48], gate)
    assert torch.equal(fused[64:112], up)
    assert not fused[48:64].any()
    assert not fused[112:].any()
    assert all(map(torch.equal, VISION_GATE_UP.to_hf(fused, CONFIG), (gate, up)))
    assert VISION_GATE_UP.to_megatron([bias, bias], CONFIG).shape == (128,)
    columns = VISION_DOWN.to_megatron([down], CONFIG)
    assert columns.shape == (32, 64)
    assert not columns[:, 48:].any()
    assert torch.equal(VISION_DOWN.to_hf(columns, CONFIG)[0], down)
    assert replace(VISION, intermediate_size=3420).padded_intermediate_size == 3456
    assert replace(VISION, intermediate_size=3456).padded_intermediate_size == 3456


def test_patch_embedding() -> None:
    kernel = torch.randn(32, 3, 2, 14, 14)
    matrix = PATCH_EMBED.to_megatron([kernel], CONFIG)
    assert matrix.shape == (32, 1176)
    assert torch.equal(matrix[5, ((2 * 2 + 1) * 14 + 3) * 14 + 4], kernel[5, 2, 1, 3, 4])
    assert torch.equal(PATCH_EMBED.to_hf(matrix, CONFIG)[0], kernel)
