"""A packed dataset, read by record batches: one ranged read each, its checksum always verified."""

import threading

import numpy as np
import pyarrow as pa
import xxhash

from kanyun.errors import DatasetError
from kanyun.manifest import Manifest, digest_of
from kanyun.naming import BATCHES
from kanyun.schema import Pack
from kanyun.storage import Folder

_MAGIC_BYTES = 8


class PackedDataset:
    """One packed folder. Record batches are numbered 0 .. batches - 1 over all shards. Threads may share it.

    Raises DatasetError if the folder has no manifest, or its index does not belong to the manifest.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self.manifest = Manifest.load(folder)
        index = folder.read(BATCHES)
        if digest_of(index) != self.manifest.batches_digest:
            raise DatasetError(
                f"{folder.uri}/{BATCHES} has digest {digest_of(index)}, the manifest says "
                f"{self.manifest.batches_digest}: fetch or pack the dataset again"
            )
        table = pa.ipc.open_file(index).read_all()
        self._shard, self._offset, self._size, self._checksum = (
            table[name].to_numpy() for name in ("shard", "offset", "size", "checksum")
        )
        self.packs_per_batch: np.ndarray = table["packs"].to_numpy().astype(np.int64)  # [batches]
        self.pack_attention: np.ndarray = _flat(table["pack_attention"])  # [packs] sum of squared segment lengths
        self.pack_segments: np.ndarray = _flat(table["pack_segments"])  # [packs] segments, tail included
        self.pack_patches: np.ndarray = _flat(table["pack_patches"])  # [packs] vision patches
        self.pack_images: np.ndarray = _flat(table["pack_images"])  # [packs]
        self.pack_windows: np.ndarray = _flat(table["pack_windows"])  # [packs] attention windows, see schema.py
        self._headers: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Record batches."""
        return len(self.packs_per_batch)

    def where(self, number: int) -> str:
        """Name record batch `number` in messages."""
        shard = self.manifest.shards[int(self._shard[number])]
        return f"{self.folder.uri}/{shard.name}, record batch {number} at byte {self._offset[number]}"

    def batch_bytes(self, number: int) -> int:
        return int(self._size[number])

    def read_batch(self, number: int) -> list[Pack]:
        """Return the packs of one record batch, in order.

        Raises DatasetError if its bytes do not have the checksum of the index, after a second read too.
        """
        header = self._header(int(self._shard[number]))
        message = self._message(number)
        return to_packs(pa.ipc.open_stream(header + message).read_next_batch())

    def _message(self, number: int) -> bytes:
        shard = self.manifest.shards[int(self._shard[number])]
        offset, size = int(self._offset[number]), int(self._size[number])
        for _ in range(2):  # a second read may come from another replica
            data = self.folder.read(shard.name, offset, size)
            if xxhash.xxh3_64_intdigest(data) == self._checksum[number]:
                return data
        raise DatasetError(
            f"{self.where(number)} ({size} bytes) does not have its checksum, read twice: "
            "find the damage with `python -m kanyun verify`, then fetch or pack the dataset again"
        )

    def _header(self, shard: int) -> bytes:
        """Return the schema and dictionary messages of a shard, which readers need before its record batches."""
        with self._lock:
            if shard not in self._headers:
                info = self.manifest.shards[shard]
                first = int(self._offset[np.searchsorted(self._shard, shard)])
                header = self.folder.read(info.name, _MAGIC_BYTES, first - _MAGIC_BYTES)
                if digest_of(header) != info.header_digest:
                    raise DatasetError(f"{self.folder.uri}/{info.name}: the header is damaged: fetch or pack it again")
                self._headers[shard] = header
            return self._headers[shard]


def to_packs(batch: pa.RecordBatch) -> list[Pack]:
    """Return the rows of a record batch as packs; token arrays are views of it."""
    rows, length = batch.num_rows, batch.schema.field("input_ids").type.list_size
    ids = batch["input_ids"].flatten().to_numpy().reshape(rows, length)
    mask = batch["loss_mask"].flatten().to_numpy(zero_copy_only=False).reshape(rows, length)
    packs = []
    for i in range(rows):
        grids = np.array(batch["image_grid_thw"][i].as_py(), np.int32).reshape(-1, 3)
        packs.append(
            Pack(
                pack_id=batch["pack_id"][i].as_py(),
                input_ids=ids[i],
                loss_mask=mask[i],
                cu_seqlens=batch["cu_seqlens"][i].values.to_numpy(),
                sample_ids=batch["sample_ids"][i].values.to_numpy(),
                dataset=batch["dataset"][i].as_py(),
                image_grid_thw=grids,
                images=batch["images"][i].as_py(),
            )
        )
    return packs


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    chunks = [np.empty(0, np.int64), *(chunk.flatten().to_numpy() for chunk in column.chunks)]
    return np.concatenate(chunks).astype(np.int64)
