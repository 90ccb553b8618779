"""Image sizes to patches and tokens, against transformers' own functions."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as reference

from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder
from kanyun.vision import grid_thw, image_tokens, smart_resize
from tests.support.qwen3_vl_assets import qwen3_vl_tokenizer_folder
from tests.support.qwen_assets import tiny_tokenizer_folder

# Of Qwen2.5-VL (factor 28) and Qwen3-VL (factor 32), as published and as people set them.
LIMITS = {
    28: [(56 * 56, 28 * 28 * 1280), (56 * 56, 12845056), (256 * 28 * 28, 1280 * 28 * 28), (3136, 50176)],
    32: [(65_536, 16_777_216), (1024, 65_536), (256 * 1024, 1280 * 1024), (4096, 262_144)],
}


def sizes(count: int) -> list[tuple[int, int]]:
    """Photo sizes, every extreme up to the ratio 200, and halves of a factor where banker's rounding decides."""
    rng = random.Random(7)
    found = []
    for n in range(count):
        kind = n % 4
        if kind == 0:
            pair = (rng.randint(28, 4000), rng.randint(28, 4000))
        elif kind == 1:
            side = rng.randint(1, 60)
            pair = (side, rng.randint(side, side * 200))
        elif kind == 2:
            half = rng.choice([14, 16])
            pair = (half * rng.randint(1, 200), half * rng.randint(1, 200))
        else:
            side = rng.randint(28, 300)
            pair = (side * 200, side)
        found.append(pair if rng.random() < 0.5 else pair[::-1])
    return [(h, w) for h, w in found if max(h, w) <= 200 * min(h, w)]


@pytest.mark.parametrize("factor", LIMITS)
def test_ten_thousand_sizes_resize_as_in_transformers(factor: int) -> None:
    for n, (height, width) in enumerate(sizes(10_000)):
        limits = LIMITS[factor][n % len(LIMITS[factor])]
        assert smart_resize(height, width, factor, *limits) == reference(height, width, factor, *limits), (
            height,
            width,
            limits,
        )


def test_half_of_a_factor_rounds_to_even() -> None:
    # 70 / 28 = 2.5 -> 2, 98 / 28 = 3.5 -> 4; half-up would give 3 and 4
    assert smart_resize(70, 98, 28, 784, 10**7) == (56, 112)


def test_over_ratio_200_is_an_error() -> None:
    smart_resize(28, 5600, 28, 3136, 10**6)
    with pytest.raises(ValueError, match="201"):
        smart_resize(28, 28 * 201, 28, 3136, 10**6)


def qwen2_5_vl(path: Path) -> Path:
    return tiny_tokenizer_folder(path, vision=True)


def qwen3_vl(path: Path) -> Path:
    return qwen3_vl_tokenizer_folder(path, real_vocabulary=False)


@pytest.mark.parametrize("family", [qwen2_5_vl, qwen3_vl])
def test_grid_and_tokens_as_in_the_processor(tmp_path: Path, family: Callable[[Path], Path]) -> None:
    folder = family(tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(folder)
    settings = fingerprint(Folder(str(folder))).processor
    assert settings is not None
    pairs = sizes(10_000)
    counted = processor._get_num_multimodal_tokens(image_sizes=pairs)
    for (height, width), patches, tokens in zip(pairs, counted.num_image_patches, counted.num_image_tokens):
        grid = grid_thw(width, height, settings)
        assert grid[0] * grid[1] * grid[2] == patches
        assert image_tokens(grid, settings["merge_size"]) == tokens
