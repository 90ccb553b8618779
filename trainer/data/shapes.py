"""Static shapes: the sizes that every micro-batch is padded to, so that one CUDA graph serves them all."""

from dataclasses import dataclass

import numpy as np

from kanyun.vision import WINDOW
from trainer.data.images import PatchGeometry
from trainer.data.source import Packs

# Padding patches form images of this many: large enough to add few segments, small enough that full attention over
# them costs little (it grows with the square; a 784 x 784 picture has 3,136).
PADDING_IMAGE = 1024
# Shape buckets of patches. Where pictures have many sizes, packs fill 1 bucket to 68 %, 4 to 98.1, 16 to 99.5.
PATCH_BUCKETS = 16


@dataclass(frozen=True)
class StaticShape:
    """Sizes of a micro-batch. Patches are padded, with separate images, to the next shape bucket; cumulative lengths
    repeat their last entry (segments of length 0).
    """

    segments: int
    patches: tuple[int, ...]  # shape buckets, rising; each has a CUDA graph
    windows: int
    images: int


def static_shape(packs: Packs, micro_batch: int, geometry: PatchGeometry | None) -> StaticShape:
    """Return sizes with room for any `micro_batch` of these packs. `geometry`: None for a text model.

    Padding patches take windows and images too, see make_batch.
    """
    segments = _largest(packs.column("pack_segments"), micro_batch)
    if geometry is None:
        return StaticShape(segments=segments, patches=(0,), windows=0, images=0)
    side = geometry.window // geometry.patch
    window = side**2  # patches
    patches = packs.column("pack_patches")
    padding = -(-patches.max(initial=1) // window) * window - patches
    # The dataset counts the 8 x 8 windows of Qwen's released models: one of them holds at most this many smaller ones.
    windows_of_images = packs.column("pack_windows") * (-(-WINDOW // side)) ** 2
    windows = _largest(windows_of_images + -(-padding // window), micro_batch) + 1
    images = _largest(packs.column("pack_images") + -(-padding // PADDING_IMAGE), micro_batch)
    together = np.add.reduceat(patches, np.arange(0, len(patches), micro_batch))  # of some micro-batches
    demands = np.append(together, _largest(patches, micro_batch))
    whole_windows = -(-np.maximum(demands, 1) // window) * window
    return StaticShape(segments, shape_buckets(whole_windows, PATCH_BUCKETS), windows, images)


def shape_buckets(demands: np.ndarray, count: int) -> tuple[int, ...]:
    """Return at most `count` rising sizes with the least padding in total when each demand takes the next larger one.

    Exact, by dynamic programming over the distinct demands: the best sizes up to each, with one more size a round.
    """
    sizes, times = np.unique(demands, return_counts=True)
    up_to = np.cumsum(times)
    total, chosen = sizes * up_to, [(int(size),) for size in sizes]  # where size i is the last one
    for _ in range(count - 1):
        # [j, i]: size j as the one before i
        totals = total[:, None] + sizes * (up_to - up_to[:, None])
        totals[np.tri(len(sizes), dtype=bool)] = np.iinfo(totals.dtype).max
        before, least = totals.argmin(axis=0), totals.min(axis=0)
        chosen = [(*chosen[before[i]], int(sizes[i])) if least[i] < total[i] else chosen[i] for i in range(len(sizes))]
        total = np.minimum(total, least)
    return chosen[-1]


def _largest(values: np.ndarray, count: int) -> int:
    """Return the sum of the `count` largest: what that many packs have at most."""
    return int(np.sort(values)[-count:].sum())
