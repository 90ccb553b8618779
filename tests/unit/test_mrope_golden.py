"""Positions against transformers' get_rope_index, each segment alone."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from trainer.data.mrope import mrope_positions

IMAGE, TEXT = 151655, 17


MODELS = {"qwen2_5_vl": (Qwen2_5_VLModel, Qwen2_5_VLConfig), "qwen3_vl": (Qwen3VLModel, Qwen3VLConfig)}


@pytest.fixture(scope="module", params=MODELS)
def model(request: Any) -> Any:
    """Return transformers' model without weights: get_rope_index reads only the config."""
    make, config = MODELS[request.param]
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "out_hidden_size": 16}
    text: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    text |= {"intermediate_size": 16, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    with torch.device("meta"):
        return make(config(text_config=text, vision_config=vision))


def theirs(model: Any, ids: np.ndarray, grids_thw: np.ndarray) -> np.ndarray:
    """transformers' positions [3, n] of one sequence."""
    types = torch.tensor((ids == IMAGE).astype(np.int32))[None]
    grids = torch.tensor(grids_thw) if len(grids_thw) else None
    positions, _ = model.get_rope_index(torch.tensor(ids)[None], types, image_grid_thw=grids)
    return positions[:, 0].numpy()


def random_segment(rng: np.random.Generator, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of text with images in between, text of any length (also none) at both ends, and patch grids [n, 3]."""
    grids = np.stack([np.ones(images), *(2 * rng.integers(1, 9, (2, images)))], axis=1).astype(np.int64)
    ids: list[int] = [TEXT] * int(rng.integers(0 if images else 1, 9))
    for _, height, width in grids:
        ids += [IMAGE] * (height * width // 4) + [TEXT] * int(rng.integers(1, 12))
    if images and rng.random() < 0.5:
        while ids[-1] != IMAGE:
            ids.pop()
    return np.array(ids), grids


def test_one_segment_equals_transformers(model: Any) -> None:
    rng = np.random.default_rng(1)
    for round_ in range(5000):  # 10,000 images
        ids, grids = random_segment(rng, images=round_ % 5)
        ours = mrope_positions(ids, np.array([0, len(ids)]), grids[:, 1:] // 2, IMAGE)
        assert (ours == theirs(model, ids, grids)).all(), round_


def test_each_segment_of_a_pack_is_as_if_alone(model: Any) -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        segments = [random_segment(rng, int(rng.integers(0, 4))) for _ in range(int(rng.integers(1, 7)))]
        ids = np.concatenate([segment[0] for segment in segments])
        cu_seqlens = np.cumsum([0] + [len(segment[0]) for segment in segments])
        grids = np.concatenate([segment[1] for segment in segments])
        ours = mrope_positions(ids, cu_seqlens, grids[:, 1:] // 2, IMAGE)
        assert (ours == np.concatenate([theirs(model, *segment) for segment in segments], axis=1)).all()


def test_text_has_three_equal_rows() -> None:
    ours = mrope_positions(np.full(7, TEXT), np.array([0, 3, 7]), np.empty((0, 2), np.int64), -1)
    assert ours.tolist() == [[0, 1, 2, 0, 1, 2, 3]] * 3


def test_image_tokens_that_do_not_fit_the_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="5 image tokens, but the image grids need 6"):
        mrope_positions(np.full(5, IMAGE), np.array([0, 5]), np.array([[2, 3]]), IMAGE)
