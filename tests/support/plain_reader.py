"""Reads packed datasets by docs/dataset_format.md, with pyarrow and the standard library alone.

Nothing of kanyun is imported: what this file needs to know is what the document must say.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

MAGIC_BYTES = 8  # "ARROW1" and two bytes of padding, before the schema message


class PlainDataset:
    """One packed folder on a local disk. Record batches are read by byte range, as a streaming reader would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if self.manifest["format_version"] != 4:
            raise ValueError(f"{folder} has format version {self.manifest['format_version']}, this reader knows 4")
        with pa.OSFile(str(folder / "batches.arrow")) as index:
            self.batches: list[dict[str, Any]] = pa.ipc.open_file(index).read_all().to_pylist()

    def packs(self) -> Iterator[dict[str, Any]]:
        """Every pack in stored order: a row of the shard, without conversion of any kind."""
        for batch in self.batches:
            yield from self._read(batch).to_pylist()

    def _read(self, batch: dict[str, Any]) -> pa.RecordBatch:
        first = next(other for other in self.batches if other["shard"] == batch["shard"])
        path = self.folder / self.manifest["shards"][batch["shard"]]["name"]
        with path.open("rb") as stream:
            stream.seek(MAGIC_BYTES)
            header = stream.read(first["offset"] - MAGIC_BYTES)  # the schema and dictionary messages
            stream.seek(batch["offset"])
            message = stream.read(batch["size"])
        return pa.ipc.open_stream(header + message).read_next_batch()


def segments(pack: dict[str, Any]) -> Iterator[tuple[list[int], list[int | None]]]:
    """(input ids, labels) of each sample of a pack. A label is the next token of the sample, or None: not trained."""
    ends = pack["cu_seqlens"]
    for start, end, _ in zip(ends, ends[1:], pack["sample_ids"]):  # no sample id for the tail
        ids, trained = pack["input_ids"][start:end], pack["loss_mask"][start:end]
        labels = [token if is_target else None for token, is_target in zip(ids[1:], trained[1:])]
        yield ids, [*labels, None]


def images(pack: dict[str, Any], image_token_id: int, merge_size: int) -> Iterator[tuple[int, bytes]]:
    """(first token slot, encoded bytes) of each image of a pack. Its tokens follow one another from there."""
    slots = (slot for slot, token in enumerate(pack["input_ids"]) if token == image_token_id)
    for (frames, rows, columns), data in zip(pack["image_grid_thw"], pack["images"]):
        mine = [next(slots) for _ in range(frames * rows * columns // merge_size**2)]
        yield mine[0], data
