"""Pixels, order and positions of patches against transformers' image processors and vision utilities."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from trainer.data.patches import layout_of
from trainer.data.pixels import write_patches
from trainer.models.qwen2_5.windows import WindowGeometry
from trainer.models.qwen3_vl.positions import LearnedPositions

GEOMETRY, SQUARES = WindowGeometry(), LearnedPositions(16, 2, side=48)
UNTOUCHED = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
LIMITS: dict[str, Any] = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1000}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Qwen2VLImageProcessor:
    """What AutoProcessor makes of Qwen's own preprocessor_config.json: the torchvision backend."""
    folder = tmp_path_factory.mktemp("processor")
    settings = {"image_processor_type": "Qwen2VLImageProcessor", **LIMITS}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = AutoImageProcessor.from_pretrained(folder)
    assert type(loaded) is Qwen2VLImageProcessor
    return loaded


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Smooth areas and hard edges, so that wrong filters, rotations and channel orders all show."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 4, 4), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse, "RGBA").resize((width, height), Image.Resampling.BILINEAR)).copy()
    pixels[: height // 3, : width // 4] = rng.integers(0, 256, (height // 3, width // 4, 4))
    image = Image.fromarray(pixels, "RGBA")
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 500, (height, width), dtype=np.uint16))
    if mode == "P":  # a palette with one transparent colour
        paletted = image.convert("RGB").quantize(32)
        paletted.info["transparency"] = 3
        return paletted
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str, orientation: int | None = None) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


def in_window_order(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    index, _ = get_vision_window_index(torch.tensor([[1, *grid]]), 2, 112, 14)
    return values.reshape(-1, 4, *values.shape[1:])[index.numpy()].reshape(values.shape)


CASES = [
    ("RGB", "JPEG", (640, 480), None),
    ("RGB", "PNG", (31, 29), None),
    ("RGB", "WEBP", (300, 411), None),
    ("L", "JPEG", (100, 200), None),
    ("L", "PNG", (57, 40), None),
    ("LA", "PNG", (90, 61), None),
    ("RGBA", "PNG", (200, 133), None),
    ("P", "PNG", (150, 150), None),
    ("P", "GIF", (64, 99), None),
    ("1", "PNG", (77, 35), None),
    ("CMYK", "JPEG", (211, 97), None),
    ("I;16", "PNG", (120, 80), None),
    ("RGB", "JPEG", (1400, 30), None),
    ("RGB", "JPEG", (1600, 1200), None),
    *[("RGB", "JPEG", (333, 150), orientation) for orientation in range(2, 9)],
]


@pytest.mark.parametrize(("mode", "kind", "size", "orientation"), CASES)
def test_pixels_equal_transformers(
    processor: Qwen2VLImageProcessor, mode: str, kind: str, size: tuple[int, int], orientation: int | None
) -> None:
    data = encoded(picture(mode, *size, seed=sum(size)), kind, orientation)
    image = load_image(Image.open(io.BytesIO(data)))
    torchvision = processor(image, **UNTOUCHED)
    pil = Qwen2VLImageProcessorPil(**LIMITS)(image, **UNTOUCHED)
    _, height, width = torchvision["image_grid_thw"][0]

    patches = np.zeros((height * width, 588), np.uint8)
    write_patches(patches, data, (height, width), GEOMETRY)

    # Qwen3-VL: patches of another size, in the processor's own order.
    larger = processor(image, patch_size=16, min_pixels=32 * 32, **UNTOUCHED)
    _, rows, columns = larger["image_grid_thw"][0]
    squares = np.zeros((rows * columns, 768), np.uint8)
    write_patches(squares, data, (rows, columns), SQUARES)
    assert (squares == larger["pixel_values"].reshape(-1, 3, 2, 16 * 16)[:, :, 1].reshape(-1, 768)).all()

    frames = torchvision["pixel_values"].reshape(-1, 3, 2, 14 * 14)
    assert (frames[:, :, 0] == frames[:, :, 1]).all()  # both frames are one image: we keep one
    assert (patches == in_window_order(frames[:, :, 0].reshape(-1, 588), (height, width))).all()

    theirs = pil["pixel_values"].reshape(-1, 3, 2, 14 * 14)[:, :, 0].reshape(-1, 588)
    difference = np.abs(patches.astype(float) - in_window_order(theirs, (height, width)))
    assert difference.mean() < 0.1
    assert (difference > 1).mean() < 0.002  # edges, where Pillow 13 shrinks one axis before it enlarges the other


def grids() -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    small = [(2 * h, 2 * w) for h in range(1, 10) for w in range(1, 10)]
    return small + [(2 * int(h), 2 * int(w)) for h, w in rng.integers(1, 60, (60, 2))] + [(2, 400), (400, 2)]


def test_window_order_equals_transformers() -> None:
    for height, width in grids():
        grid = torch.tensor([[1, height, width]])
        index, cu_windows = get_vision_window_index(grid, 2, 112, 14)
        positions = get_vision_position_ids(grid, 2).numpy()
        ours = layout_of(GEOMETRY, height, width)
        assert (ours.tokens == index.numpy()).all(), (height, width)
        assert (ours.per_patch["positions"] == in_window_order(positions, (height, width))).all(), (height, width)
        assert (np.cumsum(ours.segments["windows"]) == cu_windows.numpy()[1:]).all(), (height, width)
        assert ours.segments["windows"].sum() == get_vision_cu_seqlens(grid)[-1]


def test_window_order_with_other_geometry() -> None:
    index, cu_windows = get_vision_window_index(torch.tensor([[1, 18, 30]]), 3, 8 * 2 * 3, 8)
    ours = layout_of(WindowGeometry(patch=8, merge=3, window=48), 18, 30)
    assert (ours.tokens == index.numpy()).all()
    assert (np.cumsum(ours.segments["windows"]) == cu_windows.numpy()[1:]).all()


def test_learned_positions_equal_transformers() -> None:
    """To the bit: indices, weights and rows and columns, in the order of the processor's patches."""
    for side in (48, 6, 1):
        geometry = LearnedPositions(16, 2, side)
        for height, width in grids():
            grid = torch.tensor([[1, height, width]])
            index, weight = get_vision_interpolation_indices_and_weights(grid, side, "bilinear", True, 2)
            ours = layout_of(geometry, height, width)
            assert (ours.per_patch["position_index"] == index.numpy()).all(), (side, height, width)
            assert (ours.per_patch["position_weight"] == weight.numpy()).all(), (side, height, width)
            assert (ours.per_patch["positions"] == get_vision_position_ids(grid, 2).numpy()).all()
            assert ours.tokens.tolist() == list(range(height * width // 4))
            assert ours.segments["images"].tolist() == [height * width]


def test_damaged_image_raises() -> None:
    data = encoded(picture("RGB", 400, 300, seed=0), "JPEG")
    with pytest.raises(OSError, match="truncated"):
        write_patches(np.zeros((16, 588), np.uint8), data[: len(data) // 2], (4, 4), GEOMETRY)
