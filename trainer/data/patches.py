"""How images become patches: the order in which a tower reads them, and what it reads of each besides its pixels.

transformers permutes activations on the device where a tower attends in windows. Here the order is an index that
depends on the grid alone, applied while pixels are copied out of the image. Imports no torch: planning asks families.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from trainer.data.source import Packs

# Padding patches form images of this many: large enough to add few segments, small enough that full attention over
# them costs little (it grows with the square; a 784 x 784 picture has 3,136).
PADDING_IMAGE = 1024


@dataclass(frozen=True)
class ImageLayout:
    """The P = h x w patches of one image as a tower reads them; M = P / merge^2 visual tokens. Arrays are read-only."""

    tokens: np.ndarray  # [M] int64: visual token j is the tokens[j]-th image token in the text
    # [P, ...]: "positions" [P, 2] int32, row and column of the patch; and what else the family's tower reads of a patch
    per_patch: Mapping[str, np.ndarray]
    # Lengths in patches of the segments within which patches attend: "images", and a family's own.
    segments: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PatchGeometry:
    """How an image becomes patches: merge blocks row by row, whole images attending. A family may have a subclass."""

    patch: int  # pixels, side of a patch
    merge: int  # patches a side that become one visual token

    @property
    def pixels(self) -> int:
        """Values of a patch: 3 channels x side x side."""
        return 3 * self.patch * self.patch

    @property
    def multiple(self) -> int:
        """A number of patches is padded to a multiple of this, 16 visual tokens: fp8 needs such a number of rows."""
        return 16 * self.merge**2

    @property
    def padding(self) -> dict[str, int]:
        """Patches of the segments that padding is cut into, by the names of ImageLayout.segments."""
        return {"images": PADDING_IMAGE}

    def most_segments(self, packs: "Packs") -> dict[str, np.ndarray]:
        """Return how many segments each pack's images have at most, [packs], by the names of ImageLayout.segments."""
        return {"images": packs.column("pack_images")}

    def layout(self, height: int, width: int) -> ImageLayout:
        """Return the layout of an image of height x width patches; `layout_of` caches it."""
        tokens = np.arange(height * width // self.merge**2)
        positions = self.block_positions(tokens, width)
        return ImageLayout(tokens, {"positions": positions}, {"images": np.array([height * width], np.int32)})

    def block_positions(self, tokens: np.ndarray, width: int) -> np.ndarray:
        """Return row and column of the merge x merge patches of each of `tokens`, [P, 2] int32, row by row in a block.

        tokens [M] are numbered row by row; `width`: of the image, in patches.
        """
        row, column = np.divmod(tokens, width // self.merge)
        inner = np.divmod(np.arange(self.merge**2), self.merge)
        rows, columns = row[:, None] * self.merge + inner[0], column[:, None] * self.merge + inner[1]
        return np.stack([rows.ravel(), columns.ravel()], axis=1).astype(np.int32)


@lru_cache(maxsize=4096)
def layout_of(geometry: PatchGeometry, height: int, width: int) -> ImageLayout:
    """Return the layout of an image of height x width patches: all images of this grid share it."""
    layout = geometry.layout(height, width)
    for array in (layout.tokens, *layout.per_patch.values(), *layout.segments.values()):
        array.flags.writeable = False
    return layout
