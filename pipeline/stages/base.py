"""Base class of all stages: read -> transform -> write -> report, in an attempt that is renamed into place.

A stage is a frozen dataclass; its fields are its settings. A complete stage:

    @dataclass(frozen=True)
    class Shorten(Stage):
        name, after, schema = "shorten", "filter", SAMPLE      # its name, the stage before it, its rows
        quarantines = True                                     # rows with a `reason` go to quarantine/
        distributions: ClassVar[dict[str, str]] = {"characters": "length(text)"}   # histograms: title -> SQL over data/
        limit: int = 1000                                      # a setting

        def transform(self, rows: DataFrame, attempt: Attempt) -> DataFrame:
            return map_rows(rows, partial(shorten, limit=self.limit), self.schema)   # pipeline.spark

    Shorten("IN", "OUT", limit=10).run(overwrite=False)

- `transform` gets the rows of IN/data. Where the stage quarantines, it returns all of them, with the columns of
  `schema` and of QUARANTINE: rows with a `reason` are written to quarantine/, the others to data/. The counts reveal a
  lost row: override `added_and_dropped` if a row may become several or none.
- Work in Python goes through `map_rows`; no result may depend on how rows are partitioned.
- Other inputs: override `inputs` (sample has several) and `read` (preprocess reads raw files).
- Output other than parquet: override `write`; write below `attempt.folder`, which becomes `attempt.target`.
- `settings` decides whether finished work is the same work: override it if a field is a path to a file that may change.
- A stage whose rows change has a new number in schema.VERSIONS: outputs of earlier releases are then refused.
- A line in stages/table.py makes it a command, a step of recipes, and a level of the row flow.
"""

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from kanyun.errors import UserError
from kanyun.manifest import canonical, digest_of
from kanyun.storage import Folder
from pipeline.readers.base import encodable
from pipeline.reports import summary
from pipeline.reports.report import Report, RowCounts
from pipeline.schema import QUARANTINE, VERSIONS
from pipeline.spark import SparkProgress, plain_errors, read_parquet, spark_session
from pipeline.stages.attempt import Attempt

SHUFFLE_ROWS = 50_000  # a partition, before Spark joins small ones; its fixed number of 200 is too large or too small
SHUFFLE_PARTITIONS = 4  # at least


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline; see the top of this file."""

    source: str
    output: str

    name: ClassVar[str]
    after: ClassVar[str] = ""
    schema: ClassVar[pa.Schema]
    quarantines: ClassVar[bool] = False
    distributions: ClassVar[dict[str, str]] = {}

    @classmethod
    def for_command(cls, source: str, output: str, **settings: Any) -> "Stage":
        """Make the stage that a command line or a recipe runs; pack names its own folder below `output`."""
        return cls(source, output, **settings)

    def transform(self, rows: DataFrame, attempt: Attempt) -> DataFrame:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return JSON values that, together with the input, determine the output."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("source", "output")}

    def versioned_settings(self) -> dict[str, Any]:
        """Return the settings, with the version of the rows where an earlier release wrote others."""
        return self.settings() | ({"version": VERSIONS[self.name]} if self.name in VERSIONS else {})

    def inputs(self) -> dict[str, Report]:
        """Return the reports of the outputs that this stage reads. Raises UserError if one is missing or unfinished."""
        return {".": Report.load(Folder(self.source), self.after)}

    def input_digest(self, inputs: dict[str, Report]) -> str:
        """Return a digest of the input. Input that was made once more differs, because image refs point into it."""
        return digest_of(canonical({path: report.digest for path, report in inputs.items()}))

    def read(self, spark: SparkSession, attempt: Attempt) -> DataFrame:
        return read_parquet(Folder(self.source) / "data")

    def write(self, rows: DataFrame, attempt: Attempt) -> RowCounts:
        """Write data/ and quarantine/, and count the written rows."""
        data, bad = attempt.folder / "data", attempt.folder / "quarantine"
        if self.quarantines:
            rows = rows.persist(StorageLevel.DISK_ONLY)  # two writes, one computation
            marked = F.col("reason").isNotNull()
            with attempt.timed("transform and write data"):
                rows.where(~marked).select(*self.schema.names).write.parquet(data.uri)
            with attempt.timed("write quarantine"):
                rows.where(marked).select(*QUARANTINE.names).write.parquet(bad.uri)
            rows.unpersist()
        else:
            with attempt.timed("transform and write data"):
                rows.select(*self.schema.names).write.parquet(data.uri)
        with attempt.timed("count"):
            written = self._written(data)
            rows_out = written.count()
            quarantined = summary.reasons(self._written(bad, QUARANTINE)) if self.quarantines else {}
            rows_in = attempt.rows_in if attempt.inputs else rows_out + sum(quarantined.values())
            added, dropped = self.added_and_dropped(written, rows_in)
        return RowCounts(rows_in, rows_out, added, quarantined, dropped)

    def added_and_dropped(self, written: DataFrame, rows_in: int) -> tuple[int, int]:
        """Return the rows made beyond one for each input row, and the number of input rows that became none."""
        return 0, 0

    def run(self, overwrite: bool = False) -> Report:
        """Make the output, unless it exists. Raises UserError: input missing, OUT is other work, OUT not writable."""
        target = self.target()
        inputs = self.inputs()
        digest = self.input_digest(inputs)
        if not overwrite and (done := self._finished(target, digest)):
            return done
        with Attempt.begin(target, inputs) as attempt, plain_errors():
            if not overwrite and (done := self._finished(target, digest)):
                return done  # published by another driver before this one had its claim
            started = time.time()
            with attempt.timed("start Spark"):
                spark = spark_session()
            spark.conf.set("spark.sql.shuffle.partitions", max(SHUFFLE_PARTITIONS, attempt.rows_in // SHUFFLE_ROWS))
            with SparkProgress(spark, self.name):
                with attempt.timed("plan"):
                    rows = self.transform(self.read(spark, attempt), attempt)
                counts = self.write(rows, attempt)
                counts.check(f"{self.name} of {self.source}")
                with attempt.timed("report"):
                    summary_of_rows = self.seen(attempt)
                report = self.report(attempt, digest, counts, summary_of_rows, time.time() - started)
            report.save(attempt.folder)
            attempt.publish()
        print(f"{self.name}: {report.summary()} -> {target.path}")
        return report

    def report(
        self, attempt: Attempt, input_digest: str, counts: RowCounts, summary_of_rows: dict[str, Any], seconds: float
    ) -> Report:
        return Report(
            stage=self.name,
            settings=self.versioned_settings(),
            input=input_digest,
            run=uuid.uuid4().hex,
            counts=counts,
            since_raw=counts.after([report.since_raw for report in attempt.inputs.values()]),
            seconds=round(seconds, 1),
            phases=attempt.phases,
            **({"reasons": counts.quarantined} | summary_of_rows),
        )

    def seen(self, attempt: Attempt) -> dict[str, Any]:
        """Return the report's summary of the written rows: distributions, examples of each reason, and the reasons of
        rows that stay among the others (those of quarantine/ are counted when it is written)."""
        data = self._written(attempt.folder / "data")
        marked = self._written(attempt.folder / "quarantine", QUARANTINE) if self.quarantines else data
        shown: dict[str, Any] = {"distributions": summary.histograms(data, self.distributions)}
        if "reason" not in marked.columns:
            return shown
        if not self.quarantines:
            shown["reasons"] = summary.reasons(marked)
        return shown | {"examples": summary.examples(marked, self.images_of, attempt.inputs.values())}

    def images_of(self, rejected: Row) -> Iterable[bytes]:
        """Yield the encoded images of a rejected row, for the report."""
        return summary.images_in_blobs(rejected)

    def _written(self, folder: Folder, schema: pa.Schema | None = None) -> DataFrame:
        return read_parquet(folder, schema or self.schema)

    def _finished(self, target: Folder, digest: str) -> Report | None:
        """Return the report if `target` has this very output, None if it is empty. Raises UserError otherwise."""
        if not target.names():
            return None
        report = Report.load_if_there(target)
        if report is None:
            raise UserError(
                f"{target.path} holds {', '.join(target.names()[:3])} and no output of the {self.name} stage: "
                "choose another output, or give --overwrite to replace all of it"
            )
        existing = {"stage": report.stage, "input": report.input} | report.settings
        requested = {"stage": self.name, "input": digest} | json.loads(canonical(self.versioned_settings()))
        for key in requested | existing:
            if existing.get(key) != requested.get(key):
                raise UserError(
                    f"{target.path} holds the output of other work: {key} is {existing.get(key)} there and "
                    f"{requested.get(key)} here; choose another output, or give --overwrite to redo it"
                )
        print(f"{self.name}: already done, skipped: {target.path}")
        return report

    def target(self) -> Folder:
        """Return the output, links followed. Raises UserError, before any work, if a finished one cannot replace it."""
        target = Folder(self.output).resolved()
        source = Folder(self.source)
        for folder in (target, source) if self.after else (target,):
            if (shown := encodable(folder.path)) != folder.path:
                raise UserError(f"{shown} is a name that is no UTF-8, and Spark cannot use it: choose another folder")
        if target.contains(source):
            raise UserError(f"the output {target.path} holds the input {source.path}: choose another output")
        if target.is_mount():
            raise UserError(
                f"the output {target.path} is a mount point, which cannot be renamed: choose a folder in it"
            )
        if not target.is_local and ":" in target.path:
            raise UserError(f"the output {target.path} has a colon, which HDFS takes in no name: choose another output")
        if target.exists() and not target.is_folder():
            raise UserError(f"the output {target.path} is a file: choose a folder")
        return target
