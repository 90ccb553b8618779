"""Static shapes: the sizes that every micro-batch is padded to, so that one CUDA graph serves them all."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from trainer.data.patches import PatchGeometry
from trainer.data.source import Packs

# Shape buckets of patches. Where pictures have many sizes, packs fill 1 bucket to 68 %, 4 to 98.1, 16 to 99.5.
PATCH_BUCKETS = 16


@dataclass(frozen=True)
class StaticShape:
    """Sizes of a micro-batch. Patches are padded, with separate segments, to the next shape bucket; cumulative lengths
    repeat their last entry (segments of length 0).
    """

    segments: int  # of tokens
    patches: tuple[int, ...]  # shape buckets, rising; each has a CUDA graph
    vision: Mapping[str, int] = field(default_factory=dict)  # segments of patches, by the names of ImageLayout.segments


def static_shape(packs: Packs, micro_batch: int, geometry: PatchGeometry | None) -> StaticShape:
    """Return sizes with room for any `micro_batch` of these packs. `geometry`: None for a text model.

    Padding patches take segments too, see make_batch.
    """
    segments = _largest(packs.column("pack_segments"), micro_batch)
    if geometry is None:
        return StaticShape(segments, patches=(0,))
    patches, multiple = packs.column("pack_patches"), geometry.multiple
    padding = -(-patches.max(initial=1) // multiple) * multiple - patches
    of_images = geometry.most_segments(packs)
    vision = {
        name: _largest(of_images[name] + -(-padding // length), micro_batch)
        for name, length in geometry.padding.items()
    }
    together = np.add.reduceat(patches, np.arange(0, len(patches), micro_batch))  # of some micro-batches
    demands = np.append(together, _largest(patches, micro_batch))
    padded = -(-np.maximum(demands, 1) // multiple) * multiple
    return StaticShape(segments, shape_buckets(padded, PATCH_BUCKETS), vision)


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
