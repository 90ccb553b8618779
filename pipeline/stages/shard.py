"""A task of the pack stage: one bucket of samples becomes one shard."""

import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from pyspark import TaskContext

from kanyun.errors import DatasetError
from kanyun.schema import Sample
from kanyun.storage import Folder
from kanyun.storage.streams import Ranges
from kanyun.writer import RESULT_SCHEMA, ShardWriter
from pipeline.images.blobs import short_digest
from pipeline.schema import BUILT
from pipeline.spark import arrow_schema
from pipeline.stages.bin_packing import pack

READ_THREADS = 8
WINDOW_BYTES = 32 << 20  # of images that are read at a time; two windows are in memory
GAP_BYTES = 64 << 10  # images nearer than this in a blob are one read: another request costs more
READ_BYTES = 16 << 20  # and no read is longer
TASK_ROW = RESULT_SCHEMA.append(pa.field("samples", pa.int64()))  # the single small row of a task


@dataclass(frozen=True)
class Job:
    """Arguments of a task besides its rows."""

    root: str  # URI of the folder that the shards' attempts are written below
    buckets: int
    length: int
    vision_budget: int
    seed: int
    pad_token_id: int


class ImageRef(NamedTuple):
    blob: str  # URI
    offset: int
    size: int
    digest: int


def write_shard(batches: Iterator[pa.RecordBatch], job: Job) -> Iterator[pa.RecordBatch]:
    """Write the BUILT rows of one bucket to one shard. Its bytes depend on the samples, not on their order."""
    bucket = TaskContext.get().partitionId()  # partition n has bucket n, an empty one too
    received = list(batches)
    table = pa.Table.from_batches(received) if received else arrow_schema(BUILT).empty_table()
    rows = _Rows(table)
    datasets = table.column("dataset").unique().to_pylist()
    with ShardWriter(Folder(job.root), bucket, job.buckets, job.length, job.pad_token_id, datasets) as writer:
        for packs, images in _with_images(rows, plan(table, bucket, job)):
            for numbers in packs:
                writer.add([rows.sample(number, images) for number in numbers])
    assert writer.result is not None
    row = {**writer.result.row(), "samples": table.num_rows}
    yield pa.RecordBatch.from_pylist([row], TASK_ROW)


def plan(table: pa.Table, bucket: int, job: Job) -> list[np.ndarray]:
    """Return the row numbers of each pack, in the order in which packs are written: by a hash of the seed.

    Raises DatasetError if a row occurs twice.
    """
    if not table.num_rows:
        return []
    by_sample = np.lexsort([table.column(name).to_numpy() for name in ("piece", "copy", "sample_id")])
    _refuse_repeated(table, by_sample)
    rank = np.empty(len(by_sample), np.int64)  # of each row among the samples: rows come in any order
    rank[by_sample] = np.arange(len(by_sample))
    tokens, patches = (table.column(name).to_numpy() for name in ("tokens", "patches"))
    assigned = pack(tokens, patches, rank, job.length, job.vision_budget)
    by_pack = np.lexsort((rank, assigned))
    packs = np.split(by_pack, np.flatnonzero(np.diff(assigned[by_pack])) + 1)
    order = sorted(range(len(packs)), key=lambda n: xxhash.xxh3_64_intdigest(f"{job.seed}/{bucket}/{n}".encode()))
    return [packs[n] for n in order]


def _refuse_repeated(table: pa.Table, by_sample: np.ndarray) -> None:
    """Raise DatasetError if two rows are the same piece of the same copy of a sample. by_sample: rows in that order."""
    same = np.ones(len(by_sample) - 1, np.bool_)
    for name in ("sample_id", "copy", "piece"):
        same &= np.diff(table.column(name).to_numpy()[by_sample]) == 0
    if same.any():
        first = int(np.argmax(same))
        rows = table.take(pa.array(by_sample[first : first + 2])).to_pylist()
        raise DatasetError(repeated_id(rows[0]["sample_id"], *map(where, rows)))


def repeated_id(sample_id: int, one: str, other: str) -> str:
    return f"two rows have the sample_id {sample_id}: {one} and {other}; run `sample` on inputs without such rows"


def where(row: Any) -> str:
    """Name a row of BUILT in messages."""
    return f"{row['dataset']}: {row['file']} @ {row['position']}"


class _Rows:
    """Rows of a BUILT table by number, tokens and masks without a copy."""

    def __init__(self, table: pa.Table):
        column = {name: table.column(name).combine_chunks() for name in BUILT.names}
        self._keys = [column[name].to_numpy() for name in ("sample_id", "copy", "piece")]
        self._datasets, self._grids = column["dataset"], column["image_grid_thw"]
        self._images = column["images"].offsets.to_numpy()
        # Python values once: a row's as_py() costs 30 us, as much as copying its images.
        self._refs = [column["images"].values.field(name).to_pylist() for name in ImageRef._fields]
        self._offsets = column["input_ids"].offsets.to_numpy()
        self._ids = column["input_ids"].values.to_numpy()
        self._mask = column["loss_mask"].values.to_numpy(zero_copy_only=False)

    def refs(self, number: int) -> list[ImageRef]:
        start, end = self._images[number], self._images[number + 1]
        return [ImageRef(*values) for values in zip(*(column[start:end] for column in self._refs))]

    def sample(self, number: int, images: dict[ImageRef, memoryview]) -> Sample:
        start, end = self._offsets[number], self._offsets[number + 1]
        sample_id, copy, piece = (int(values[number]) for values in self._keys)
        return Sample(
            sample_id=sample_id,
            dataset=self._datasets[number].as_py(),
            copy=copy,
            piece=piece,
            input_ids=self._ids[start:end],
            loss_mask=self._mask[start:end],
            image_grid_thw=self._grids[number].as_py(),
            images=[images[ref] for ref in self.refs(number)],
        )


_Window = tuple[list[np.ndarray], dict[ImageRef, memoryview]]


def _with_images(rows: _Rows, packs: Iterable[np.ndarray]) -> Iterator[_Window]:
    """Yield a few packs at a time with the bytes of their images, while those of the next few are read."""
    blob = lru_cache(maxsize=64)(_blob)  # kept open for this task, not for the worker: a later run may find others
    with ThreadPoolExecutor(READ_THREADS) as threads:
        reading: deque[tuple[list[np.ndarray], list[Future[dict[ImageRef, memoryview]]]]] = deque()
        for window, refs in _windows(rows, packs):
            reading.append((window, [threads.submit(read_images, neighbours, blob) for neighbours in ranges(refs)]))
            if len(reading) == 2:
                yield _finished(*reading.popleft())
        while reading:
            yield _finished(*reading.popleft())


def _finished(window: list[np.ndarray], reads: list[Future[dict[ImageRef, memoryview]]]) -> _Window:
    images: dict[ImageRef, memoryview] = {}
    for read in reads:
        images |= read.result()
    return window, images


def _windows(rows: _Rows, packs: Iterable[np.ndarray]) -> Iterator[tuple[list[np.ndarray], set[ImageRef]]]:
    """Yield packs in order, as many at a time as have WINDOW_BYTES of images, with the refs of these."""
    window: list[np.ndarray] = []
    refs: set[ImageRef] = set()
    for numbers in packs:
        window.append(numbers)
        refs.update(ref for number in numbers for ref in rows.refs(number))
        if sum(ref.size for ref in refs) >= WINDOW_BYTES or len(window) >= 256:
            yield window, refs
            window, refs = [], set()
    if window:
        yield window, refs


def ranges(refs: Iterable[ImageRef]) -> list[list[ImageRef]]:
    """Return `refs` in groups of neighbours in a blob, each of which one read can fetch."""
    groups: list[list[ImageRef]] = []
    for ref in sorted(refs):
        if groups:
            first, last = groups[-1][0], groups[-1][-1]
            end = ref.offset + ref.size
            near = ref.blob == last.blob and ref.offset - (last.offset + last.size) <= GAP_BYTES
            if near and end - first.offset <= READ_BYTES:
                groups[-1].append(ref)
                continue
        groups.append([ref])
    return groups


def read_images(refs: Sequence[ImageRef], blob: Callable[[str], Ranges]) -> dict[ImageRef, memoryview]:
    """Return the images of one group, by one read. Raises DatasetError if the blob does not hold them."""
    first, end = refs[0], max(ref.offset + ref.size for ref in refs)
    wrong = ""
    for opened in (blob, _blob):  # opened anew, the second read may come from another replica
        data = memoryview(opened(first.blob).read(first.offset, end - first.offset))
        images = {ref: data[ref.offset - first.offset : ref.offset - first.offset + ref.size] for ref in refs}
        damaged = [ref for ref, image in images.items() if short_digest(xxhash.xxh3_128_digest(image)) != ref.digest]
        if not damaged:
            # A view keeps the whole read in memory. Of pictures of 3 kB, every second one sampled, that was 1.1 GB.
            few = 2 * sum(ref.size for ref in images) < len(data)
            return {ref: memoryview(bytes(image)) for ref, image in images.items()} if few else images
        wrong = f"the image of {damaged[0].size} bytes at byte {damaged[0].offset} does not have its digest"
        if len(data) != end - first.offset:
            wrong = f"it ends at byte {first.offset + len(data)}, but images are recorded up to {end}"
    raise DatasetError(f"{first.blob} was changed after preprocess ({wrong}): run all stages from there again")


def _blob(uri: str) -> Ranges:
    return Folder(posixpath.dirname(uri)).ranges(posixpath.basename(uri))
