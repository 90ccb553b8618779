"""preprocess RAW OUT --dataset NAME: raw rows to samples, each checked, its images copied to blobs."""

import json
import posixpath
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa
import xxhash
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import Row as SparkRow

from kanyun.errors import UserError
from kanyun.manifest import canonical
from kanyun.storage import Folder
from pipeline.checks import Candidate, On, RowError, malformed, run_checks, without_base64
from pipeline.datasets import dataset
from pipeline.datasets.base import RawSample, Row
from pipeline.datasets.parts import MARKER
from pipeline.images.blobs import ImageCopier
from pipeline.readers import RawRow, Split, encodable, plan, read
from pipeline.readers.raw_folder import RawFolder
from pipeline.reports.report import IMAGES_A_ROW, Report, RowCounts
from pipeline.schema import SAMPLE
from pipeline.spark import BATCH_ROWS, arrow_schema, map_rows
from pipeline.stages.base import Attempt, Stage

BATCH_BYTES = 8 << 20  # of raw rows in an Arrow batch, unless a single row is longer


@dataclass(frozen=True)
class PreprocessStage(Stage):
    """Bad rows stay among the others, with `reason` and `evidence` set: filter takes them out."""

    dataset: str

    name = "preprocess"
    schema = SAMPLE
    distributions = {  # noqa: RUF012
        "bytes a raw row": "octet_length(raw)",
        "messages a row": "size(messages)",
        IMAGES_A_ROW: "size(images)",
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

    def target(self) -> Folder:
        if Folder(self.source).contains(Folder(self.output)):
            raise UserError(f"the output {self.output} is in the raw folder {self.source}: choose another output")
        return super().target()

    def input_digest(self, inputs: dict[str, Report]) -> str:
        """Return the digest of names, sizes and times of all files in RAW, images too; of RAW alone if it is a file."""
        return self._raw.listing.digest

    @cached_property
    def _raw(self) -> RawFolder:
        return RawFolder(self.source)

    def read(self, spark: SparkSession, attempt: Attempt) -> DataFrame:
        """One row and one partition a task."""
        files = self._raw.listing.files
        if left_out := self._raw.listing.left_out():
            kinds = "; ".join(f"{kind}: {what}" for kind, what in left_out.items())
            print(f"preprocess: left out of {encodable(self._raw.folder.path)}: {kinds}")
        least, most = self.task_bytes
        enough = sum(size for _, size in files) // (4 * spark.sparkContext.defaultParallelism)
        tasks = plan(files, min(max(enough, least), most))
        rows = spark.sparkContext.parallelize([([_as_row(split) for split in task],) for task in tasks], len(tasks))
        return rows.toDF("splits array<struct<file: binary, start: bigint, end: bigint, file_size: bigint>>")

    def transform(self, rows: DataFrame, attempt: Attempt) -> DataFrame:
        worker = Worker(
            self.dataset, self._raw.folder.uri, (attempt.folder / "blobs").uri, (attempt.target / "blobs").uri
        )
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

    def seen(self, attempt: Attempt) -> dict[str, Any]:
        data = self._written(attempt.folder / "data")
        marked = data.where(f"reason is null and size(images) = 0 and raw like '%{MARKER}%'").count()
        lines: dict[str, Any] = {f"rows without images whose {MARKER} is text": marked}
        lines |= {f"left out: {kind}": what for kind, what in self._raw.listing.left_out().items()}
        return super().seen(attempt) | {"facts": lines}

    def images_of(self, rejected: SparkRow) -> Iterator[bytes]:
        """Yield a rejected row's images from the raw folder, since no blob has them; none if the row is unreadable."""
        copier = ImageCopier(self._raw.folder, self._raw.folder, "")  # to read, not to copy
        try:
            images = dataset(self.dataset).sample(json.loads(rejected["raw"])).placed().images
        except Exception:
            return
        for image in images:
            with suppress(Exception):
                yield copier.read(image, rejected["file"])


def _as_row(split: Split) -> tuple[bytes, int, int, int]:
    """A file's name on a local disk is bytes, which need not be UTF-8."""
    return split.file.encode(errors="surrogateescape"), split.start, split.end, split.file_size


def _as_split(row: dict[str, Any]) -> Split:
    return Split(row["file"].decode(errors="surrogateescape"), row["start"], row["end"], row["file_size"])


@dataclass(frozen=True)
class Worker:
    """Reads a task's splits, checks their rows and copies their images: what runs on an executor."""

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
                    for split in map(_as_split, task["splits"]):
                        for raw in read(root, split):
                            rows.append(to_row(split.file, raw))
                            size += len(raw.raw)
                            if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
                                yield pa.RecordBatch.from_pylist(rows, schema)
                                rows, size = [], 0
            yield pa.RecordBatch.from_pylist(rows, schema)


class SampleMaker:
    """Makes rows of schema.SAMPLE from raw rows. Never raises for what is wrong with a row."""

    def __init__(self, name: str, copier: ImageCopier):
        self._dataset = dataset(name)
        self._copier = copier

    def __call__(self, file: str, raw: RawRow) -> dict[str, Any]:
        name, shown = self._dataset.name, encodable(file)
        row: dict[str, Any] = {
            "sample_id": xxhash.xxh3_64_intdigest(f"{name}\0{shown}\0{raw.position}".encode()) >> 1,
            "dataset": name,
            "file": shown,
            "position": raw.position,
            "raw": raw.raw,
        }
        try:
            if isinstance(raw.fields, RowError):
                raise raw.fields
            sample = self._sample(raw.fields)
            hashed = _hash(sample)
            images = [self._copier.copy(found(image, raw), file) for image in sample.images]
        except RowError as rejected:
            return row | {"reason": str(rejected.reason), "evidence": rejected.evidence}
        for image in images:
            hashed.update(image.digest)
        if any(isinstance(image, bytes) for image in sample.images):
            row["raw"] = without_base64(raw.raw)  # images that came as text
        return row | {
            "messages": sample.messages,
            "tools": sample.tools,
            "text": sample.text,
            "images": [image.ref() for image in images],
            "content_hash": hashed.digest(),
        }

    def _sample(self, fields: Row) -> RawSample:
        try:
            run_checks(On.ROW, fields)
            sample = self._dataset.sample(fields).placed()
        except RowError:
            raise
        except Exception as error:  # a dataset class may raise anything for a row that is not what it expects
            raise malformed(f"{type(error).__name__}: {error}") from error
        images = len(sample.images)
        candidate = Candidate(sample.messages, sample.text, images, sample.image_field, self._dataset.min_text)
        run_checks(On.CANDIDATE, candidate)
        return sample


def found(image: str | bytes, raw: RawRow) -> str | bytes:
    """Return the bytes of a file that came with the row, if `image` is its name, else `image`."""
    return raw.members.get(posixpath.normpath(image), image) if isinstance(image, str) else image


def _hash(sample: RawSample) -> Any:
    """Return the xxh3-128 of a sample without its images, to be updated with theirs. RowError for lone surrogates."""
    try:
        for image in sample.images:
            if isinstance(image, str):
                image.encode()
        tools = [] if sample.tools is None else [sample.tools]
        return xxhash.xxh3_128(canonical([sample.messages, sample.text, *tools]))
    except UnicodeEncodeError as error:
        raise malformed(f"half of a surrogate pair: {error}") from error
