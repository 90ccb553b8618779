"""Static shapes: segments, windows, images and patches of a micro-batch."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanyun.vision import windows
from trainer.data.patches import layout_of
from trainer.data.shapes import shape_buckets, static_shape
from trainer.models.qwen2_5.windows import WindowGeometry


def test_static_shape_has_room_for_the_worst_packs_together() -> None:
    class Packs:
        columns = {  # noqa: RUF012
            "pack_segments": [3, 9, 2, 5],
            "pack_patches": [0, 640, 128, 256],
            "pack_windows": [0, 12, 4, 4],
            "pack_images": [0, 2, 1, 1],
        }

        def column(self, name: str) -> np.ndarray:
            return np.array(self.columns[name], np.int64)

    shape = static_shape(Packs(), 2, WindowGeometry())  # type: ignore[arg-type]
    # Of a pack and of the padding behind its images: windows (64 patches each) 10, 12, 12, 10, images 1, 2, 2, 2.
    assert (shape.segments, shape.vision) == (14, {"windows": 24, "images": 4})
    assert shape.patches == (384, 640, 896)  # of packs 2 and 3, of 0 and 1, and of the two largest
    assert static_shape(Packs(), 3, None).segments == 17  # type: ignore[arg-type]
    Packs.columns = {name: [] for name in Packs.columns}  # that there are none is said later, in a sentence
    assert static_shape(Packs(), 2, WindowGeometry()).patches == (64,)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [56, 84, 112, 224])
def test_static_shape_has_room_for_the_windows_of_any_model(window: int) -> None:
    """Packed data counts windows of 112 pixels."""
    geometry = WindowGeometry(window=window)
    for grid in [(2, 2), (8, 8), (10, 6), (2, 64), (16, 18)]:
        packs = {"pack_segments": [1], "pack_images": [1]}
        packs |= {"pack_patches": [grid[0] * grid[1]], "pack_windows": [windows((1, *grid))]}
        shape = static_shape(SimpleNamespace(column=lambda name: np.array(packs[name])), 1, geometry)  # type: ignore[arg-type]  # noqa: B023
        padded = shape.patches[0] > grid[0] * grid[1]
        assert len(layout_of(geometry, *grid).segments["windows"]) + padded <= shape.vision["windows"]


@settings(max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.integers(1, 4))
def test_shape_buckets_leave_the_least_unused(demands: list[int], count: int) -> None:
    def total(sizes: tuple[int, ...]) -> int:
        return sum(min(size for size in sizes if size >= demand) for demand in demands)

    buckets, most = shape_buckets(np.array(demands), count), max(demands)
    assert len(buckets) <= count
    assert list(buckets) == sorted(set(buckets))
    others = [size for size in set(demands) if size < most]
    possible = [(*some, most) for n in range(min(count, len(others) + 1)) for some in combinations(others, n)]
    assert total(buckets) == min(map(total, possible))
