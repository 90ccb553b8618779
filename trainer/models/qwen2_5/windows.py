"""Attention windows of Qwen2.5-VL's vision tower: squares of 112 pixels, in whose order the tower reads patches."""

from dataclasses import dataclass

import numpy as np

from trainer.data.patches import ImageLayout, PatchGeometry
from trainer.data.source import Packs


@dataclass(frozen=True)
class WindowGeometry(PatchGeometry):
    """Patches in window order, so that the tower itself never permutes: windows are segments as images are."""

    patch: int = 14
    merge: int = 2
    window: int = 112  # pixels, side of an attention window

    @property
    def side(self) -> int:
        """Patches of a window's side."""
        return self.window // self.patch

    @property
    def padding(self) -> dict[str, int]:
        return super().padding | {"windows": self.side**2}

    def most_segments(self, packs: Packs) -> dict[str, np.ndarray]:
        """A dataset knows no windows, which are this tower's alone: the most there can be, by patches and images.

        a x b windows cover at least (side (a - 1) + merge) (side (b - 1) + merge) patches. So an image has at most
        1 + (patches - merge^2) / (side merge) windows, as many as one that is a single row of visual tokens.
        """
        images, patches = packs.column("pack_images"), packs.column("pack_patches")
        windows = images + (patches - images * self.merge**2) // (self.side * self.merge)
        return super().most_segments(packs) | {"windows": windows}

    def layout(self, height: int, width: int) -> ImageLayout:
        """Return the order of transformers' get_vision_window_index, merge blocks kept whole.

        Windows go row by row; in a window visual tokens go row by row; in a visual token its merge x merge patches do.
        Windows at the right and lower border are smaller where the image ends.
        """
        rows, columns, side = height // self.merge, width // self.merge, self.side // self.merge
        row, column = np.divmod(np.arange(rows * columns), columns)
        window = row // side * -(-columns // side) + column // side
        tokens = np.argsort(window, kind="stable")  # stable: row-major order remains inside a window
        windows = (np.bincount(window) * self.merge**2).astype(np.int32)
        images = np.array([height * width], np.int32)
        positions = self.block_positions(tokens, width)
        return ImageLayout(tokens, {"positions": positions}, {"images": images, "windows": windows})
