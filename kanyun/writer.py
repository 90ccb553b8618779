"""Writer of a packed dataset: one ShardWriter a shard, in any process; then `publish` once, on the driver.

Each shard is written below its own attempt folder, so retried, speculative and killed tasks do no harm: `publish` moves
the winners into place, removes the other attempts and writes the manifest last.
"""

import io
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kanyun.manifest import Manifest, ShardInfo, digest_of
from kanyun.naming import BATCHES, lineage_name, shard_name
from kanyun.schema import BATCHES_SCHEMA, LINEAGE_SCHEMA, Sample, pack_schema
from kanyun.storage import Folder
from kanyun.vision import windows

# A record batch is closed at this size: large enough for a ranged read to be worth its round trip, small enough that
# a reader of a few streams stays within some tens of MiB.
BATCH_BYTES = 4 << 20
_MAGIC_BYTES = 8  # "ARROW1" and padding, before the schema message

# A ShardResult as the single small row that a Spark task returns.
RESULT_SCHEMA = pa.schema([("shard", pa.string()), ("attempt", pa.string()), ("batches", pa.large_binary())])


@dataclass(frozen=True)
class ShardResult:
    """The result of a finished ShardWriter, for the driver."""

    info: ShardInfo
    attempt: str  # folder that it lies in, below the dataset's
    batches: pa.Table  # BATCHES_SCHEMA, without the shard's number

    def row(self) -> dict[str, Any]:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.batches.schema) as writer:
            writer.write_table(self.batches)
        info, batches = json.dumps(asdict(self.info)), sink.getvalue().to_pybytes()
        return {"shard": info, "attempt": self.attempt, "batches": batches}

    @classmethod
    def from_row(cls, row: Any) -> "ShardResult":
        batches = pa.ipc.open_stream(row["batches"]).read_all()
        return cls(ShardInfo(**json.loads(row["shard"])), row["attempt"], batches)


class ShardWriter:
    """Writes packs into shard `index` of `count`. Memory: one record batch and the shard's lineage.

    `datasets` are the names that the shard's samples may have: the Arrow file holds them once, before the first batch.
    Use it as a context manager; `result` is set when the block ends without an error.
    """

    def __init__(self, root: Folder, index: int, count: int, length: int, pad_token_id: int, datasets: Iterable[str]):
        self._attempt = f"_attempt-{uuid.uuid4().hex}"
        self._folder = root / self._attempt
        self._index, self._count, self._length, self._pad = index, count, length, pad_token_id
        self._schema = pack_schema(length)
        self._names = sorted(set(datasets))
        self._rows: list[dict[str, Any]] = []
        self._pending = 0  # bytes in _rows
        self._packs = 0
        self._batches: list[dict[str, Any]] = []
        self._lineage: list[dict[str, Any]] = []
        self._header_digest = ""
        self._digest = xxhash.xxh3_128()
        self._bytes = 0
        self.result: ShardResult | None = None

    def __enter__(self) -> "ShardWriter":
        self._open = self._folder.create(shard_name(self._index, self._count))
        self._stream: IO[bytes] = self._open.__enter__()
        self._sink = _Pieces()
        self._ipc = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), self._schema)
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()
            self._ipc.close()
            self._copy(self._sink.take())
        self._open.__exit__(*error)
        if error[0] is None:
            self.result = self._finish()

    def add(self, samples: Sequence[Sample]) -> None:
        """Append one pack made of `samples`, in order. Raises ValueError for more tokens than the pack has slots."""
        tokens = sum(len(s.input_ids) for s in samples)
        if tokens > self._length:
            raise ValueError(f"pack of {tokens} tokens in {self._length} slots")
        pack_id = (self._index << 32) | self._packs
        ids = np.full(self._length, self._pad, np.int32)
        mask = np.zeros(self._length, np.bool_)
        ends = [0]
        for segment, s in enumerate(samples):
            start, end = ends[-1], ends[-1] + len(s.input_ids)
            ids[start:end], mask[start:end] = s.input_ids, s.loss_mask
            ends.append(end)
            source = {"sample_id": s.sample_id, "dataset": s.dataset, "copy": s.copy, "piece": s.piece}
            self._lineage.append({"pack_id": pack_id, "segment": segment, **source, "tokens": end - start})
        images = [image for s in samples for image in s.images]
        row = {
            "pack_id": pack_id,
            "input_ids": ids,
            "loss_mask": mask,
            "cu_seqlens": ends if tokens == self._length else [*ends, self._length],
            "sample_ids": [s.sample_id for s in samples],
            "dataset": [s.dataset for s in samples],
            "image_grid_thw": [list(grid) for s in samples for grid in s.image_grid_thw],
            "images": images,
            "tokens": tokens,
            "attention": sum(len(s.input_ids) ** 2 for s in samples),
        }
        self._rows.append(row)
        self._packs += 1
        self._pending += self._length * 4 + self._length // 8 + sum(len(image) for image in images)
        if self._pending >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        batch = self._record_batch()
        self._ipc.write_batch(batch)
        pieces = self._sink.take()
        size = pa.ipc.get_record_batch_size(batch)
        if not self._batches:  # the first write also brought magic, schema and dictionary
            data = b"".join(pieces)
            header, pieces = data[:-size], [data[-size:]]
            self._header_digest = digest_of(header[_MAGIC_BYTES:])
            self._copy([header])
        checksum = xxhash.xxh3_64()
        for piece in pieces:
            checksum.update(piece)
        patches = [sum(int(np.prod(grid)) for grid in row["image_grid_thw"]) for row in self._rows]
        self._batches.append(
            {
                "shard": 0,
                "offset": self._bytes,
                "size": size,
                "packs": len(self._rows),
                "tokens": sum(row["tokens"] for row in self._rows),
                "patches": sum(patches),
                "checksum": checksum.intdigest(),
                "pack_attention": [row["attention"] for row in self._rows],
                "pack_segments": [len(row["cu_seqlens"]) - 1 for row in self._rows],
                "pack_patches": patches,
                "pack_images": [len(row["images"]) for row in self._rows],
                "pack_windows": [sum(map(windows, row["image_grid_thw"])) for row in self._rows],
            }
        )
        self._copy(pieces)
        self._rows, self._pending = [], 0

    def _record_batch(self) -> pa.RecordBatch:
        column = {name: [row[name] for row in self._rows] for name in self._schema.names}
        fixed = {
            "input_ids": pa.array(np.concatenate(column["input_ids"])),
            "loss_mask": pa.array(np.concatenate(column["loss_mask"])),
        }
        arrays = []
        for f in self._schema:
            if f.name in fixed:
                arrays.append(pa.FixedSizeListArray.from_arrays(fixed[f.name], type=f.type))
            elif f.name == "dataset":
                arrays.append(self._dataset_column(column["dataset"]))
            else:
                arrays.append(pa.array(column[f.name], f.type))
        return pa.record_batch(arrays, schema=self._schema)

    def _dataset_column(self, rows: list[list[str]]) -> pa.ListArray:
        number = {name: i for i, name in enumerate(self._names)}
        codes = pa.array([number[name] for row in rows for name in row], pa.int32())
        values = pa.DictionaryArray.from_arrays(codes, pa.array(self._names, pa.string()))
        offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), values, type=self._schema.field("dataset").type)

    def _copy(self, pieces: Iterable[bytes | pa.Buffer]) -> None:
        for piece in pieces:
            self._stream.write(piece)
            self._digest.update(piece)
            self._bytes += len(piece)

    def _finish(self) -> ShardResult:
        table = pa.Table.from_pylist(self._lineage, LINEAGE_SCHEMA)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self._folder.write(lineage_name(self._index, self._count), buffer.getvalue())
        info = ShardInfo(
            name=shard_name(self._index, self._count),
            bytes=self._bytes,
            packs=self._packs,
            header_digest=self._header_digest,
            digest=self._digest.hexdigest(),
            lineage_digest=digest_of(buffer.getvalue()),
        )
        return ShardResult(info, self._attempt, pa.Table.from_pylist(self._batches, BATCHES_SCHEMA))


def publish(folder: Folder, results: Iterable[ShardResult], **fields: Any) -> Manifest:
    """Make a dataset of the shards of `results`: move them into place, write batches.arrow, and the manifest last.

    `fields` are those of Manifest that do not follow from the shards. Attempts that are not in `results` are deleted.
    """
    by_name = sorted(results, key=lambda r: r.info.name)
    tables = []
    for number, result in enumerate(by_name):
        attempt, lineage = folder / result.attempt, lineage_name(number, len(by_name))
        attempt.move_file(result.info.name, folder, result.info.name)
        attempt.move_file(lineage, folder, lineage)
        shard = pa.array(np.full(result.batches.num_rows, number, np.uint32))
        tables.append(result.batches.set_column(0, "shard", shard))
    for name in folder.names():
        if name.startswith("_attempt-"):
            folder.delete(name)
    batches = pa.concat_tables(tables).combine_chunks() if tables else BATCHES_SCHEMA.empty_table()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, BATCHES_SCHEMA) as writer:
        writer.write_table(batches)
    index = sink.getvalue().to_pybytes()
    folder.write(BATCHES, index)
    manifest = Manifest(
        packs=sum(r.info.packs for r in by_name),
        tokens=_total(batches["tokens"]),
        patches=_total(batches["patches"]),
        shards=tuple(r.info for r in by_name),
        batches_digest=digest_of(index),
        **fields,
    )
    manifest.counts.check(folder.uri)
    manifest.save(folder)
    return manifest


def _total(column: pa.ChunkedArray) -> int:
    return int(np.asarray(column, dtype=np.int64).sum())


class _Pieces(io.RawIOBase):
    """A sink that keeps the written buffers, without a copy, until `take`."""

    def __init__(self) -> None:
        self._pieces: list[bytes | pa.Buffer] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(data)
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def take(self) -> list[bytes | pa.Buffer]:
        pieces, self._pieces = self._pieces, []
        return pieces
