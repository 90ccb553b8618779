"""Qwen3-VL's grids, pixels and processor settings against transformers' own AutoProcessor."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder
from kanyun.vision import grid_thw, image_tokens
from tests.support.qwen3_vl_assets import TOKEN_PIXELS, processor_settings, qwen3_vl_tokenizer_folder
from trainer.data.pixels import decode


def sizes_to_try() -> list[tuple[int, int]]:
    """Extremes first: a single token, thin lines, just under and over both limits; then random ones."""
    rng = random.Random(5)
    found = [(32, 32), (28, 28), (28, 5600), (6400, 32), (31, 33), (48, 48), (47, 49), (64, 64), (65, 64), (63, 64)]
    found += [(512, 512), (511, 513), (528, 528), (1024, 256), (16, 3200), (80, 48)]
    return found + [(rng.randint(28, 700), rng.randint(28, 700)) for _ in range(14)]


def picture(width: int, height: int) -> bytes:
    """Smooth areas and edges, in a format that costs no time."""
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR)).copy()
    pixels[: height // 3, : width // 4] = rng.integers(0, 256, (height // 3, width // 4, 3))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "BMP")
    return stream.getvalue()


LIMITS = [(4 * TOKEN_PIXELS, 256 * TOKEN_PIXELS), (TOKEN_PIXELS, 64 * TOKEN_PIXELS)]


@pytest.mark.parametrize("limits", LIMITS)
def test_pixels_and_grids_equal_the_processor(tmp_path: Path, limits: tuple[int, int]) -> None:
    folder = qwen3_vl_tokenizer_folder(tmp_path, real_vocabulary=False, min_pixels=limits[0], max_pixels=limits[1])
    processor, settings = (
        AutoProcessor.from_pretrained(folder).image_processor,
        fingerprint(Folder(str(folder))).processor,
    )
    assert settings is not None
    for width, height in sizes_to_try():
        data = picture(width, height)
        expected = processor(Image.open(io.BytesIO(data)), return_tensors="np")
        grid = grid_thw(width, height, settings)
        assert grid == tuple(expected["image_grid_thw"][0]), (width, height)
        levels = in_patches(decode(data, grid[1] * 16, grid[2] * 16), grid)
        mean, std = (np.repeat(settings[name], 16 * 16) for name in ("image_mean", "image_std"))
        pixels = ((levels / 255 - mean) / std).astype(np.float32).reshape(-1, 3, 1, 16 * 16)
        both_frames = np.broadcast_to(pixels, (len(pixels), 3, 2, 16 * 16)).reshape(len(pixels), -1)
        np.testing.assert_allclose(expected["pixel_values"], both_frames, rtol=0, atol=1e-6)


def in_patches(image: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """[3, height, width] to [patches, 3 x 16 x 16], the four patches of a token together."""
    _, rows, columns = grid
    tiles = image.reshape(3, rows // 2, 2, 16, columns // 2, 2, 16)
    return tiles.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, -1)


def test_the_largest_picture(tmp_path: Path) -> None:
    """16,384 tokens, the most that the published settings allow."""
    folder, data = qwen3_vl_tokenizer_folder(tmp_path, real_vocabulary=False), picture(4100, 4099)
    settings = fingerprint(Folder(str(folder))).processor
    assert settings is not None
    grid = grid_thw(4100, 4099, settings)
    assert image_tokens(grid, settings["merge_size"]) == 16_384
    untouched = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    expected = AutoProcessor.from_pretrained(folder).image_processor(Image.open(io.BytesIO(data)), **untouched)
    frames = expected["pixel_values"].reshape(-1, 3, 2, 16 * 16)
    assert tuple(expected["image_grid_thw"][0]) == grid
    assert (frames[:, :, 0].reshape(-1, 768) == in_patches(decode(data, 4096, 4096), grid)).all()


def test_settings_as_transformers_saves_them_are_the_same(tmp_path: Path) -> None:
    """The hub has `size`, transformers 5 writes processor_config.json; old tools write min_pixels and max_pixels."""
    made = qwen3_vl_tokenizer_folder(tmp_path / "hub", real_vocabulary=False)
    AutoProcessor.from_pretrained(made).save_pretrained(tmp_path / "saved")
    hub, saved = (fingerprint(Folder(str(folder))) for folder in (made, tmp_path / "saved"))
    assert not (tmp_path / "saved/preprocessor_config.json").exists()
    assert saved.digest == hub.digest
    assert hub.processor == {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 65_536,
        "max_pixels": 16_777_216,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    named = processor_settings(1, 1) | {"min_pixels": 65_536, "max_pixels": 16_777_216}  # which win over `size`
    (made / "preprocessor_config.json").write_text(json.dumps(named))
    assert fingerprint(Folder(str(made))).digest == hub.digest
    size = AutoProcessor.from_pretrained(made).image_processor.size
    assert (size.shortest_edge, size.longest_edge) == (65_536, 16_777_216)
