"""Attention windows of Qwen2.5-VL's vision tower: squares of 112 pixels, in whose order the tower reads patches."""

from dataclasses import dataclass

import numpy as np

from kanyun.vision import WINDOW
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
        # The dataset counts the 8 x 8 windows of Qwen's released models: one holds at most this many smaller ones.
        windows = packs.column("pack_windows") * (-(-WINDOW // self.side)) ** 2
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
