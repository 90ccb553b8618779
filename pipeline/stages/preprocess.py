"""preprocess RAW OUT --dataset NAME: raw rows to samples, each checked, its images copied to blobs."""

import json
import posixpath
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import pyarrow as pa
import xxhash
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import Row as SparkRow

from kanyun.errors import UserError
from kanyun.manifest import canonical
from kanyun.storage import Folder
from kanyun.storage.retries import call_with_retry
from pipeline.checks import (
    RowError,
    check_image_count,
    check_messages,
    check_no_video,
    check_text,
    malformed,
    text_after_images,
)
from pipeline.datasets import dataset
from pipeline.datasets.base import RawSample, Row
from pipeline.images.blobs import ImageCopier
from pipeline.readers import SUFFIXES, RawRow, Split, plan, read
from pipeline.reports.report import Report, RowCounts
from pipeline.schema import SAMPLE
from pipeline.spark import BATCH_ROWS, arrow_schema, map_rows
from pipeline.stages.base import Attempt, Stage

HIDDEN = (".", "_", "cache-")  # how files and folders start that are no data; the last is what datasets.map leaves
BATCH_BYTES = 8 << 20  # of raw rows in an Arrow batch, unless a single row is longer
# What a dataset class may raise, besides RowError, for a row that is not what it expects.
WRONG_FIELDS = (KeyError, IndexError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class PreprocessStage(Stage):
    """Bad rows stay among the others, with `reason` and `evidence` set: filter takes them out."""

    dataset: str

    name = "preprocess"
    schema = SAMPLE
    distributions = {  # noqa: RUF012
        "bytes a raw row": "octet_length(raw)",
        "messages a row": "size(messages)",
        "images a row": "size(images)",
        "long side of an image, pixels": "transform(images, image -> greatest(image.width, image.height))",
        "short side of an image, pixels": "transform(images, image -> least(image.width, image.height))",
        "bytes an image": "images.size",
    }
    # Bytes of raw files a task reads. Fewer than the upper end where that would leave cores idle: rows that name images
    # are short, and 1 MB of them can be an hour of decoding.
    task_bytes: ClassVar[tuple[int, int]] = (16 << 10, 64 << 20)

    def __post_init__(self) -> None:
        dataset(self.dataset)

    def inputs(self) -> dict[str, Report]:
        return {}

    def input_digest(self, inputs: dict[str, Report]) -> str:
        """Of the names, sizes and times of all files below RAW, images too; of RAW alone if it is a file.

        The sum of a digest a file, which needs neither an order nor memory: there may be an image a sample.
        """
        if Folder(self.source).contains(Folder(self.output)):
            raise UserError(f"the output {self.output} is in the raw folder {self.source}: choose another output")
        return self._files[1]

    @cached_property
    def _root(self) -> Folder:
        folder = Folder(self.source)
        if not folder.exists():
            raise UserError(f"the raw folder {self.source} does not exist: give a folder of {_known_suffixes()} files")
        return folder if folder.is_folder() else folder.parent

    @cached_property
    def _files(self) -> tuple[list[tuple[str, int]], str]:
        """((path below RAW, bytes) of every file of rows, digest of all files); those of HIDDEN are left out."""
        source = Folder(self.source)
        folders, files, total, count = [""], [], 0, 0
        only = "" if source.is_folder() else source.name
        while folders:
            listing = call_with_retry(partial(_list, self._root, folders.pop(), only))
            folders += listing.folders
            files += listing.files
            total, count = total + listing.digest, count + listing.count
        if not any(size for _, size in files):
            what = f"{len(files)} files, all empty" if files else f"none among {count} files"
            raise UserError(f"{self.source} has no rows: it needs {_known_suffixes()} files and has {what}")
        return sorted(files), f"{total % 2**128:032x}"

    def read(self, spark: SparkSession, attempt: Attempt) -> DataFrame:
        """One row and one partition a task."""
        files, _ = self._files
        least, most = self.task_bytes
        enough = sum(size for _, size in files) // (4 * spark.sparkContext.defaultParallelism)
        tasks = plan(files, min(max(enough, least), most))
        rows = spark.sparkContext.parallelize(
            [([tuple(asdict(split).values()) for split in task],) for task in tasks], len(tasks)
        )
        return rows.toDF("splits array<struct<file: string, start: bigint, end: bigint, file_size: bigint>>")

    def transform(self, rows: DataFrame, attempt: Attempt) -> DataFrame:
        worker = Worker(self.dataset, self._root.uri, (attempt.folder / "blobs").uri, (attempt.target / "blobs").uri)
        return map_rows(rows, worker, SAMPLE)

    def write(self, rows: DataFrame, attempt: Attempt) -> RowCounts:
        counts = super().write(rows, attempt)
        used = self._written(attempt.folder / "data").selectExpr("explode(images.blob) as blob").distinct()
        names = {row["blob"].rsplit("/", 1)[1] for row in used.toLocalIterator()}
        blobs = attempt.folder / "blobs"
        for name in set(blobs.names()) - names:  # of tasks that were killed, or ran twice
            blobs.delete(name)
        if not counts.rows_in:
            raise UserError(f"{self.source} has no rows: its files hold blank lines or empty tables only")
        return counts

    def images_of(self, rejected: SparkRow) -> Iterator[bytes]:
        """From the raw folder: no blob has them."""
        copier = ImageCopier(self._root, self._root, "")  # to read, not to copy
        try:
            images = dataset(self.dataset).sample(json.loads(rejected["raw"])).images
        except (RowError, *WRONG_FIELDS):
            return
        for image in images:
            with suppress(RowError, OSError, UserError):
                yield copier.read(image, rejected["file"])


@dataclass(frozen=True)
class _Listing:
    """What a folder has; names are below RAW."""

    folders: list[str]
    files: list[tuple[str, int]]  # of rows
    digest: int  # the sum of those of its files
    count: int  # of its files


def _list(root: Folder, folder: str, only: str) -> _Listing:
    """`only`: the one file to look at, if it is not empty."""
    folders, files, digest, count = [], [], 0, 0
    for entry in (root / folder if folder else root).entries():
        if entry.name.startswith(HIDDEN) or (only and entry.name != only):
            continue
        name = posixpath.join(folder, entry.name)
        if entry.is_folder:
            folders.append(name)
            continue
        known_by = f"{name}\0{entry.size}\0{entry.modified}"
        digest += xxhash.xxh3_128_intdigest(known_by.encode(errors="surrogateescape"))  # a name may be any bytes
        count += 1
        if name.lower().endswith(SUFFIXES):
            files.append((name, entry.size))
    return _Listing(folders, files, digest, count)


@dataclass(frozen=True)
class Worker:
    """What runs in a task."""

    dataset: str
    root: str  # URIs
    blobs: str
    final_blobs: str

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        root, schema = Folder(self.root), arrow_schema(SAMPLE)
        with ImageCopier(root, Folder(self.blobs), self.final_blobs) as copier:
            to_row = SampleMaker(self.dataset, copier)
            rows: list[dict[str, Any]] = []
            size = 0
            for batch in batches:
                for task in batch.to_pylist():
                    for split in task["splits"]:
                        for raw in read(root, Split(**split)):
                            rows.append(to_row(split["file"], raw))
                            size += len(raw.raw)
                            if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
                                yield pa.RecordBatch.from_pylist(rows, schema)
                                rows, size = [], 0
            yield pa.RecordBatch.from_pylist(rows, schema)


class SampleMaker:
    """Raw rows to rows of schema.SAMPLE. Never raises for what is wrong with a row."""

    def __init__(self, name: str, copier: ImageCopier):
        self._dataset = dataset(name)
        self._copier = copier

    def __call__(self, file: str, raw: RawRow) -> dict[str, Any]:
        name = self._dataset.name
        row: dict[str, Any] = {
            "sample_id": xxhash.xxh3_64_intdigest(f"{name}\0{file}\0{raw.position}".encode()) >> 1,
            "dataset": name,
            "file": file,
            "position": raw.position,
            "raw": raw.raw,
        }
        try:
            if isinstance(raw.fields, RowError):
                raise raw.fields
            sample = self._sample(raw.fields)
            hashed = _hash(sample)
            images = [self._copier.copy(image, file) for image in sample.images]
        except RowError as rejected:
            return row | {"reason": str(rejected.reason), "evidence": rejected.evidence}
        for image in images:
            hashed.update(image.digest)
        return row | {
            "messages": sample.messages,
            "text": sample.text,
            "images": [image.ref() for image in images],
            "content_hash": hashed.digest(),
        }

    def _sample(self, fields: Row) -> RawSample:
        check_no_video(fields)
        try:
            sample = self._dataset.sample(fields)
        except WRONG_FIELDS as error:
            raise malformed(f"{type(error).__name__}: {error}") from error
        if sample.messages is None:
            check_text(sample.text or "", self._dataset.min_text)
        else:
            check_messages(sample.messages)
            check_image_count(sample.messages, len(sample.images))
            check_text(text_after_images(sample.messages), self._dataset.min_text)
        return sample


def _hash(sample: RawSample) -> Any:
    """xxh3-128 of what the sample says, to which its images are then added. Raises RowError for lone surrogates."""
    try:
        for image in sample.images:
            if isinstance(image, str):
                image.encode()
        return xxhash.xxh3_128(canonical([sample.messages, sample.text]))
    except UnicodeEncodeError as error:
        raise malformed(f"half of a surrogate pair: {error}") from error


def _known_suffixes() -> str:
    return " or ".join(SUFFIXES)
