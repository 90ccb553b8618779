"""The Arrow schemas of format version 4, and a pack in memory.

Source of truth for columns: one row is one training sequence of exactly `length` token slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

# One row a record batch: the index for reading, checksums and the order of training. The cost of a pack depends on the
# model; the columns pack_* are what it is computed from.
BATCHES_SCHEMA = pa.schema(
    [
        ("shard", pa.uint32()),  # index into Manifest.shards
        ("offset", pa.uint64()),  # bytes, from the start of the shard file to the record batch message
        ("size", pa.uint64()),  # bytes of the message
        ("packs", pa.uint32()),
        ("tokens", pa.uint64()),  # useful token slots
        ("patches", pa.uint64()),  # vision patches
        ("checksum", pa.uint64()),  # xxh3-64 of the message's bytes
        ("pack_attention", pa.list_(pa.int64())),  # a pack's sum of squared segment lengths, tail excluded
        ("pack_segments", pa.list_(pa.int32())),  # a pack's segments, tail included
        ("pack_patches", pa.list_(pa.int32())),  # a pack's vision patches
        ("pack_images", pa.list_(pa.int32())),  # a pack's images
        ("pack_windows", pa.list_(pa.int32())),  # Qwen2.5-VL's attention windows in a pack's images (kanyun.vision)
    ]
)

LINEAGE_SCHEMA = pa.schema(
    [
        ("pack_id", pa.uint64()),
        ("segment", pa.int32()),  # position in the pack
        ("sample_id", pa.uint64()),
        ("dataset", pa.string()),
        ("copy", pa.int32()),  # which copy of the sample, over all epochs
        ("piece", pa.int32()),  # which piece of a split document
        ("tokens", pa.int32()),
    ]
)


def pack_schema(length: int) -> pa.Schema:
    """Schema of a shard whose packs have `length` token slots."""
    return pa.schema(
        [
            ("pack_id", pa.uint64()),
            ("input_ids", pa.list_(pa.int32(), length)),
            ("loss_mask", pa.list_(pa.bool_(), length)),  # true = this token is a trained target
            ("cu_seqlens", pa.list_(pa.int32())),  # 0, ends of the segments, then `length`: the tail is a segment too
            ("sample_ids", pa.list_(pa.uint64())),  # one a segment, none for the tail
            ("dataset", pa.list_(pa.dictionary(pa.int32(), pa.string()))),
            ("image_grid_thw", pa.list_(pa.list_(pa.int32(), 3))),
            ("images", pa.list_(pa.large_binary())),  # encoded bytes as they came, in the order of their tokens
        ]
    )


@dataclass(frozen=True)
class Sample:
    """One segment, before it is packed."""

    sample_id: int
    dataset: str
    copy: int
    piece: int
    input_ids: np.ndarray  # [tokens] int32
    loss_mask: np.ndarray  # [tokens] bool
    image_grid_thw: Sequence[Sequence[int]]  # [images][3]
    images: Sequence[bytes | memoryview]  # [images] encoded


@dataclass(frozen=True)
class Pack:
    """One pack, read back."""

    pack_id: int
    input_ids: np.ndarray  # [length] int32
    loss_mask: np.ndarray  # [length] bool
    cu_seqlens: np.ndarray  # [segments + 1] int32, the tail included; last entry = length
    sample_ids: np.ndarray  # [samples] uint64
    dataset: list[str]  # [samples]
    image_grid_thw: np.ndarray  # [images, 3] int32
    images: list[bytes]  # [images] encoded

    @property
    def tokens(self) -> int:
        """Useful token slots: all but the tail."""
        return int(self.cu_seqlens[len(self.sample_ids)])

    @property
    def patches(self) -> int:
        return int(self.image_grid_thw.prod(axis=1).sum())
