"""Learned positions of Qwen3-VL's vision tower, interpolated to an image's grid: indices and weights of neighbours."""

from dataclasses import dataclass

import numpy as np

from trainer.data.patches import ImageLayout, PatchGeometry


@dataclass(frozen=True)
class LearnedPositions(PatchGeometry):
    """Patches with their four neighbours in a square grid of learned positions."""

    side: int  # rows, and columns, of that grid

    def layout(self, height: int, width: int) -> ImageLayout:
        """Return the layout, with "position_index" and "position_weight" [P, 4] for each patch.

        The corners of an image lie on those of the grid, and patches in between are interpolated bilinearly:
        transformers' get_vision_interpolation_indices_and_weights, in its float32.
        """
        layout = super().layout(height, width)
        row, column = layout.per_patch["positions"].T
        (rows, row_weights), (columns, column_weights) = self._axis(row, height), self._axis(column, width)
        index = rows[:, :, None] * self.side + columns[:, None, :]
        weight = row_weights[:, :, None] * column_weights[:, None, :]
        taps = {"position_index": index.reshape(-1, 4), "position_weight": weight.reshape(-1, 4)}
        return ImageLayout(layout.tokens, {**layout.per_patch, **taps}, layout.segments)

    def _axis(self, place: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the two neighbours of each `place` [P] on an axis of `size` patches: index int64, weight float32."""
        at = place.astype(np.float32) * np.float32(self.side - 1) / np.float32(max(size - 1, 1))
        below = np.floor(at)
        neighbours = below[:, None] + np.arange(2, dtype=np.float32)
        weights = np.maximum(1 - np.abs(at[:, None] - neighbours), 0)
        return np.minimum(neighbours, self.side - 1).astype(np.int64), weights
