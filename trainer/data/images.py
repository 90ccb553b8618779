"""Decodes images into the patches that the vision tower reads, in window order.

The tower attends in windows of 8 x 8 patches. transformers permutes activations into window order on the device and
back; here the permutation is an index that depends on the grid alone, applied while pixels are copied out of the image.
"""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


@dataclass(frozen=True)
class PatchGeometry:
    """Sizes from the model's vision config, in pixels except `merge`."""

    patch: int = 14  # side of a patch
    merge: int = 2  # patches a side that become one visual token
    window: int = 112  # side of an attention window

    @property
    def pixels(self) -> int:
        """Values of a patch: 3 channels x side x side."""
        return 3 * self.patch * self.patch


@dataclass(frozen=True)
class WindowOrder:
    """The P = h x w patches of one image in window order; M = P / merge^2 visual tokens."""

    positions: np.ndarray  # [P, 2] int32: row and column of the patch
    windows: np.ndarray  # [windows] int32: patches in each attention window
    tokens: np.ndarray  # [M] int64: visual token j is the tokens[j]-th image token in the text


@lru_cache(maxsize=4096)
def window_order(height: int, width: int, geometry: PatchGeometry) -> WindowOrder:
    """Return the order of transformers' get_vision_window_index for height x width patches, merge blocks kept whole.

    Windows go row by row; in a window visual tokens go row by row; in a visual token its merge x merge patches do.
    Windows at the right and lower border are smaller where the image ends.
    """
    merge, side = geometry.merge, geometry.window // geometry.patch // geometry.merge  # side: in visual tokens
    rows, columns = height // merge, width // merge
    row, column = np.divmod(np.arange(rows * columns), columns)
    window = row // side * -(-columns // side) + column // side
    tokens = np.argsort(window, kind="stable")  # stable: row-major order remains inside a window

    inner = np.divmod(np.arange(merge * merge), merge)
    patch_rows = row[tokens, None] * merge + inner[0]
    patch_columns = column[tokens, None] * merge + inner[1]
    order = WindowOrder(
        positions=np.stack([patch_rows.ravel(), patch_columns.ravel()], axis=1).astype(np.int32),
        windows=(np.bincount(window) * merge * merge).astype(np.int32),
        tokens=tokens,
    )
    for array in (order.positions, order.windows, order.tokens):
        array.flags.writeable = False  # cached: all images of this grid share them
    return order


def decode(data: bytes, height: int, width: int) -> np.ndarray:
    """Return an image decoded and resized to height x width pixels: [3, height, width] uint8.

    Bit for bit what AutoProcessor's image processor (torchvision backend) makes of transformers.image_utils.load_image:
    EXIF rotation, RGB (transparency is dropped, not blended), bicubic in torch's uint8 kernel, which takes 3 ms where
    Pillow's takes 12 (1200 x 900 to 784 x 784). Pillow differs by one level, by more at hard edges where version 13
    shrinks columns before it enlarges rows. Raises whatever Pillow raises for a damaged image.
    """
    with Image.open(io.BytesIO(data)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        pixels = torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))
    channels_first = pixels.permute(2, 0, 1)[None]
    if channels_first.shape[2:] != (height, width):
        channels_first = F.interpolate(channels_first, (height, width), mode="bicubic", antialias=True)
    return channels_first[0].numpy()


def write_patches(out: np.ndarray, data: bytes, grid: tuple[int, int], geometry: PatchGeometry) -> WindowOrder:
    """Decode an image of grid = (h, w) patches into out [h * w, pixels] uint8: window order, channel major.

    Copies the pixels once, from the resized image to `out`.
    """
    height, width = grid
    side = geometry.patch
    order = window_order(height, width, geometry)
    pixels = decode(data, height * side, width * side).reshape(3, height, side, width, side)
    rows, columns = order.positions.T
    out.reshape(-1, 3, side, side)[:] = pixels.transpose(1, 3, 0, 2, 4)[rows, columns]
    return order
