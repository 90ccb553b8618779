"""build IN OUT --tokenizer HF: rows to tokens, loss mask and image grids, as the processor makes them (encoder.py)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from kanyun.errors import UserError
from kanyun.fingerprint import TOKENIZER_FILES, check_images, check_model, copy_tokenizer
from kanyun.manifest import canonical, digest_of
from kanyun.storage import Folder
from pipeline.checks import Reason
from pipeline.encoder import Encoded, Encoder, Rejected
from pipeline.reports.report import IMAGES_A_ROW, Report
from pipeline.schema import BUILT, QUARANTINE
from pipeline.spark import map_rows
from pipeline.stages.base import Attempt, Stage
from pipeline.tokenizer_settings import Settings

TOKENIZER = "tokenizer"  # folder in the output: a copy of the tokenizer's files
TASKS_A_CORE = 4  # at least: at the end, cores wait for a quarter of their work at most
# A task's output columns: those of data/, and those of quarantine/, which are null unless the row has a reason.
OUTCOME = pa.schema([*BUILT, *(field for field in QUARANTINE if field.name not in BUILT.names)])
_COPIED = ("sample_id", "dataset", "file", "position", "copy", "images")
_EMPTY = Encoded(np.empty(0, np.int32), np.empty(0, np.bool_), [])
_COPIED_IF_REJECTED = tuple(name for name in QUARANTINE.names if name not in (*_COPIED, "reason", "evidence"))


@dataclass(frozen=True)
class BuildStage(Stage):
    """Quarantines samples of more than `length` tokens (too_long): nothing is truncated.

    With overflow="split" a text document becomes pieces of `length` tokens instead; a conversation never does.
    """

    name, after, schema, quarantines = "build", "sample", BUILT, True
    distributions = {"tokens a row": "tokens", "patches a row": "patches", IMAGES_A_ROW: "size(images)"}  # noqa: RUF012

    tokenizer: str  # Hugging Face folder
    length: int
    overflow: str = "drop"  # of text documents: drop | split

    def settings(self) -> dict[str, Any]:
        """The tokenizer is identified by the digest of its files; sample's settings are passed on to pack."""
        if self.overflow not in ("drop", "split"):
            raise UserError(f"--overflow is {self.overflow!r}: give drop or split")
        if self.length < 1:
            raise UserError(f"--length is {self.length}: give the token slots of a pack, for example 8192")
        folder = Folder(self.tokenizer)
        check_model(folder)
        files = {name: digest_of(folder.read(name)) for name in TOKENIZER_FILES if folder.exists(name)}
        sampling = Report.load(Folder(self.source), self.after).settings
        return {"tokenizer": digest_of(canonical(files)), "length": self.length, "overflow": self.overflow, **sampling}

    def read(self, spark: SparkSession, attempt: Attempt) -> DataFrame:
        """Read in tasks of equal bytes: 128 MB (spark.sql.files.maxPartitionBytes), less if that makes too few.

        The least is 4 MB of parquet (spark.sql.files.openCostInBytes): 2,500 rows of 2.6 kB of JSON, about 4 s.
        """
        spark.conf.set("spark.sql.files.minPartitionNum", TASKS_A_CORE * spark.sparkContext.defaultParallelism)
        rows = super().read(spark, attempt)
        try:
            check_images(Folder(self.tokenizer))
        except UserError:  # its texts can be built: rows are looked at for such a model alone
            if rows.where("size(images) > 0").head(1):
                raise
        return rows

    def transform(self, rows: DataFrame, attempt: Attempt) -> DataFrame:
        settings = Settings.load(self.tokenizer)
        copy_tokenizer(Folder(self.tokenizer), attempt.folder / TOKENIZER)
        work = partial(build, settings=settings, length=self.length, split=self.overflow == "split")
        return map_rows(rows, work, OUTCOME)

    def added_and_dropped(self, written: DataFrame, rows_in: int) -> tuple[int, int]:
        return written.where("piece > 0").count(), 0


def build(batches: Iterator[pa.RecordBatch], settings: Settings, length: int, split: bool) -> Iterator[pa.RecordBatch]:
    """Encode batches of SAMPLED rows into batches of OUTCOME rows: one row for one, or the pieces of a document."""
    encoder = _encoder(settings)
    for batch in batches:
        yield build_batch(batch, encoder, length, split=split)


def build_batch(batch: pa.RecordBatch, encoder: Encoder, length: int, *, split: bool) -> pa.RecordBatch:
    encoded = encoder.encode(batch.select(["messages", "tools", "text", "images"]).to_pylist())
    is_document = batch.column("messages").is_null().to_pylist()
    outcomes = [fit(one, length, split and document) for one, document in zip(encoded, is_document)]
    return _outcome_batch(batch, outcomes)


def fit(encoded: Encoded | Rejected, length: int, split: bool) -> list[Encoded] | Rejected:
    """Return `encoded` as pieces of at most `length` tokens: one, or several if `split`; else reject it."""
    if isinstance(encoded, Rejected):
        return encoded
    tokens = len(encoded.input_ids)
    if tokens <= length:
        return [encoded]
    if not split:
        return Rejected(Reason.TOO_LONG, f"{tokens} tokens, the length is {length}")
    pieces = [slice(start, start + length) for start in range(0, tokens, length)]
    return [replace(encoded, input_ids=encoded.input_ids[s], loss_mask=encoded.loss_mask[s]) for s in pieces]


def _outcome_batch(batch: pa.RecordBatch, outcomes: list[list[Encoded] | Rejected]) -> pa.RecordBatch:
    """Build a batch of OUTCOME. Input columns are taken from `batch` by index, without becoming Python objects."""
    numbers: list[int] = []  # input row of each output row
    pieces: list[int] = []
    encoded: list[Encoded] = []
    rejected: list[Rejected | None] = []
    for number, outcome in enumerate(outcomes):
        parts = [_EMPTY] if isinstance(outcome, Rejected) else outcome
        numbers += [number] * len(parts)
        pieces += range(len(parts))
        encoded += parts
        rejected += [outcome if isinstance(outcome, Rejected) else None] * len(parts)
    lengths = np.array([len(e.input_ids) for e in encoded], np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    source = pa.array(numbers, pa.int32())
    source_if_rejected = pa.array([n if r else None for n, r in zip(numbers, rejected)], pa.int32())
    columns = {
        **{name: batch.column(name).take(source) for name in _COPIED},
        **{name: batch.column(name).take(source_if_rejected) for name in _COPIED_IF_REJECTED},
        "piece": pa.array(pieces, pa.int32()),
        "input_ids": pa.ListArray.from_arrays(
            offsets, np.concatenate([_EMPTY.input_ids, *(e.input_ids for e in encoded)])
        ),
        "loss_mask": pa.ListArray.from_arrays(
            offsets, np.concatenate([_EMPTY.loss_mask, *(e.loss_mask for e in encoded)])
        ),
        "image_grid_thw": pa.array([e.image_grid_thw for e in encoded], pa.list_(pa.list_(pa.int32()))),
        "tokens": pa.array(lengths),
        "patches": pa.array([sum(t * h * w for t, h, w in e.image_grid_thw) for e in encoded], pa.int32()),
        "reason": pa.array([r and r.reason for r in rejected], pa.string()),
        "evidence": pa.array([r and r.evidence for r in rejected], pa.string()),
    }
    return pa.record_batch([columns[name] for name in OUTCOME.names], names=OUTCOME.names)


@lru_cache(maxsize=1)
def _encoder(settings: Settings) -> Encoder:
    """Return the encoder of this Python worker, which Spark reuses for many tasks."""
    return Encoder(settings)
