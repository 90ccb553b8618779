"""Patches and tokens of an image in Qwen2.5-VL and Qwen3-VL, from its width and height alone.

Pipeline (token counts) and trainer (pixels) must agree to the pixel, and both with transformers, hence one copy here.
Both families have one image processor, and differ in its settings, which are read from the model's own folder
(`kanyun.fingerprint`) and stand in a dataset's manifest:

| | Qwen2.5-VL | Qwen3-VL |
|---|---|---|
| `patch_size`: side of a patch, pixels | 14 | 16 |
| `merge_size`: merge_size x merge_size patches are a visual token | 2 | 2 |
| factor of `smart_resize` = patch_size x merge_size: a visual token is factor x factor pixels | 28 | 32 |
| `temporal_patch_size`: frames of a patch, an image being repeated | 2 | 2 |
| `min_pixels`, `max_pixels` of the resized image as published | 3,136 to 12,845,056 | 65,536 to 16,777,216 |
| `image_mean`, `image_std` of levels / 255 | CLIP's | 0.5, 0.5 |

An image is one temporal step, (1, rows, columns) patches, and rows x columns / merge_size^2 tokens of <|image_pad|>
between <|vision_start|> and <|vision_end|>; timestamps are of videos alone.
Source: `smart_resize` in transformers 5.17, models/qwen2_vl/image_processing_qwen2_vl.py.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MAX_ASPECT_RATIO = 200
WINDOW = 8  # patches: 112 pixels, in every Qwen2.5-VL that Qwen has published; other towers have no windows


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) in pixels that an image is resized to: multiples of `factor`, area within the limits.

    round() is Python's, half to even; the JVM's is not, so lengths are never computed in Spark SQL.
    Raises ValueError if one side is over 200 times the other.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(f"aspect ratio {ratio:.0f} is over {MAX_ASPECT_RATIO}")
    resized_height, resized_width = round(height / factor) * factor, round(width / factor) * factor
    if resized_height * resized_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        resized_height = max(factor, math.floor(height / shrink / factor) * factor)
        resized_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif resized_height * resized_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        resized_height = math.ceil(height * grow / factor) * factor
        resized_width = math.ceil(width * grow / factor) * factor
    return resized_height, resized_width


def grid_thw(width: int, height: int, processor: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (temporal, rows, columns) of patches of an image. `processor`: settings of a Fingerprint or Manifest."""
    patch, merge = processor["patch_size"], processor["merge_size"]
    pixels = smart_resize(height, width, patch * merge, processor["min_pixels"], processor["max_pixels"])
    return 1, pixels[0] // patch, pixels[1] // patch


def windows(grid: Sequence[int]) -> int:
    """Count Qwen2.5-VL's attention windows in one image: squares of WINDOW x WINDOW patches, cut off at the border."""
    return grid[0] * -(-grid[1] // WINDOW) * -(-grid[2] // WINDOW)


def image_tokens(grid: Sequence[int], merge_size: int) -> int:
    """Count the token slots of one image: merge_size x merge_size patches become one token."""
    return grid[0] * grid[1] * grid[2] // merge_size**2
