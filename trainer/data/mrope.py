"""Multimodal RoPE positions of each token in time, height and width.

A text token's position is one more than the previous token's, on all three axes. An image of h x w visual tokens has
one temporal position, its row and its column on the other two axes, and the text after it starts max(h, w) later.
Equal to get_rope_index of transformers' Qwen2_5_VLModel and Qwen3VLModel, of each segment alone.
"""

import numpy as np


def mrope_positions(input_ids: np.ndarray, cu_seqlens: np.ndarray, grids: np.ndarray, image_token: int) -> np.ndarray:
    """Return positions [3, T] int64 (temporal, height, width), from 0 in each segment.

    input_ids [T]; cu_seqlens [segments + 1], last entry T; grids [images, 2]: rows and columns of *visual tokens*
    (patches / merge size) of each image, in the order of their tokens; a text model gives [0, 2] and image token -1.
    Raises ValueError if the number of image tokens is not the grids'.
    """
    step = np.ones(len(input_ids), np.int64)  # from a token's position to the next one's
    slots = np.flatnonzero(input_ids == image_token)
    cells = grids.prod(axis=1)
    if len(slots) != cells.sum():
        raise ValueError(f"{len(slots)} image tokens, but the image grids need {cells.sum()}")
    step[slots] = 0  # the tokens of an image start at the same position,
    step[slots[cells.cumsum() - 1]] = grids.max(axis=1)  # and its last one makes room for all of them

    position = step.cumsum() - step
    position -= np.repeat(position[cu_seqlens[:-1]], np.diff(cu_seqlens))
    positions = np.broadcast_to(position, (3, len(position))).copy()

    cell = np.arange(len(slots)) - np.repeat(cells.cumsum() - cells, cells)
    row, column = np.divmod(cell, np.repeat(grids[:, 1], cells))
    positions[1, slots] += row
    positions[2, slots] += column
    return positions
