"""sample: how many copies of each row go into one epoch, by the ratio of its data path.

In each data path the N samples are ordered by a hash of (sample_id, seed), and U = rank / N spreads them evenly over
[0, 1). A sample's copies in epoch e are floor(U + (e + 1) R) - floor(U + e R), in integers. So for any ratio R, any
seed and any partitioning, after any number of epochs E
- a sample has been used E x R times, less than one copy more or less: at R = 0.1 all were used after ten epochs;
- a data path has given floor(N x E x R) copies: floor(x) + floor(x + 1/N) + ... = floor(N x), by Hermite.
Were U the hash itself, totals would miss by about sqrt(N) / 2: 500 copies an epoch of a million samples.
All of it is Spark SQL: rows do not enter Python, and an integer ratio costs no shuffle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from kanyun.errors import UserError
from kanyun.storage import Folder
from kanyun.storage.links import Links
from pipeline.constants import SAMPLE_RATIO_BY_DATA_PATH
from pipeline.ratios import ratios_for, read_ratios
from pipeline.reports.report import REPORT, Report
from pipeline.schema import SAMPLE, SAMPLED
from pipeline.spark import read_parquet
from pipeline.stages.attempt import is_attempt
from pipeline.stages.base import Attempt, Stage

ONLY = "."  # data path where `source` is itself the one output of filter
RANGE_ROWS = 100_000  # rows of a hash range, which one task puts in order
_OWN_FOLDERS = ("data", "quarantine", "blobs")  # of a stage's output: no other outputs lie in them


@dataclass(frozen=True)
class SampleStage(Stage):
    """`source` is one output of filter, or a folder with several below it: each one's path below is its data path."""

    name, after, schema = "sample", "filter", SAMPLED

    epoch: int = 0
    seed: int = 0
    ratios: str | None = None  # YAML file of `data path: ratio`, in place of constants.SAMPLE_RATIO_BY_DATA_PATH

    def inputs(self) -> dict[str, Report]:
        root = Folder(self.source)
        reports = dict(_outputs(root, self.after))
        if not reports:
            if root.exists(REPORT):
                Report.load(root, self.after)  # raises: it is another stage's output
            raise UserError(
                f"no finished output of {self.after} in or below {root.path}: "
                f"run `python -m pipeline {self.after}` first"
            )
        return {path: Report.load(root / path if path != ONLY else root, self.after) for path in reports}

    def settings(self) -> dict[str, Any]:
        ratios = {path: str(ratio) for path, ratio in self._ratios(self.inputs()).items()}
        return {"epoch": self.epoch, "seed": self.seed, "ratios": ratios}

    def read(self, spark: SparkSession, attempt: Attempt) -> DataFrame:
        root, ratios, sampled = Folder(self.source), self._ratios(attempt.inputs), []
        for path, report in attempt.inputs.items():
            rows = read_parquet((root if path == ONLY else root / path) / "data").select(*SAMPLE.names)
            if path != ONLY:
                rows = rows.withColumns({"dataset": F.lit(path), "sample_id": _id_in(path)})
            sampled.append(take(rows, report.counts.rows_out, ratios[path], self.epoch, self.seed))
        return reduce(DataFrame.unionByName, sampled)

    def transform(self, rows: DataFrame, attempt: Attempt) -> DataFrame:
        return rows

    def added_and_dropped(self, written: DataFrame, rows_in: int) -> tuple[int, int]:
        """Return what the formula says, not what Spark counted: so the counts show whether it sampled as promised."""
        inputs = self.inputs()
        added = dropped = 0
        for path, ratio in self._ratios(inputs).items():
            rows = inputs[path].counts.rows_out
            copies = self._copies(rows, ratio)
            used = rows if ratio >= 1 else copies  # ratio < 1: at most one copy an epoch; ratio >= 1: at least one
            added, dropped = added + copies - used, dropped + rows - used
        return added, dropped

    def seen(self, attempt: Attempt) -> dict[str, Any]:
        """Account by name for every data path below IN, and for every one that the ratios name."""
        ratios = self._ratios(attempt.inputs)
        facts: dict[str, Any] = {}
        for path, report in attempt.inputs.items():
            rows = report.counts.rows_out
            facts[f"data path {path}"] = f"{rows:,} rows x {ratios[path]} = {self._copies(rows, ratios[path]):,} copies"
        root = Folder(self.source)
        own_name = root.name if ONLY in attempt.inputs else ONLY
        for path in sorted(set(self._table()) - set(attempt.inputs) - {own_name}):
            facts[f"data path {path}"] = f"has a ratio, and no finished output of {self.after} is at {root.path}/{path}"
            print(f"{self.name}: data path {path} {facts[f'data path {path}']}")
        return {**super().seen(attempt), "facts": facts}

    def _copies(self, rows: int, ratio: Fraction) -> int:
        return int(rows * (self.epoch + 1) * ratio) - int(rows * self.epoch * ratio)

    def _table(self) -> Mapping[str, Any]:
        return SAMPLE_RATIO_BY_DATA_PATH if self.ratios is None else read_ratios(self.ratios)

    def _ratios(self, inputs: Mapping[str, Report]) -> dict[str, Fraction]:
        table = self._table()
        name = Folder(self.source).name
        if ONLY in inputs and ONLY not in table and name in table:  # a single output goes by its folder's name too
            table = {**table, ONLY: table[name]}
        return ratios_for(list(inputs), table)


def copies_before(rank: int, count: int, ratio: Fraction, epoch: int) -> int:
    """Copies of the sample at `rank` of `count` in all epochs before `epoch`: floor(rank / count + epoch x ratio)."""
    p, q = ratio.numerator, ratio.denominator
    return (rank * q + epoch * p * count) // (count * q)


def take(rows: DataFrame, count: int, ratio: Fraction, epoch: int, seed: int) -> DataFrame:
    """Return the `count` rows of a data path, each as often as `epoch` has it, as `copies_before` says.

    The column `copy` is the copy index, counted over all epochs.
    """
    if ratio.denominator == 1:  # as many copies of each: no need to rank
        first, end = F.lit(epoch * int(ratio)), F.lit((epoch + 1) * int(ratio))
    else:
        rows = _ranked(rows, count, seed)
        first, end = (_copies_before_sql(count, ratio, e) for e in (epoch, epoch + 1))
    rows = rows.withColumn("_first", first.cast("int")).withColumn("_end", end.cast("int")).where("_first < _end")
    return rows.withColumn("copy", F.explode(F.expr("sequence(_first, _end - 1)"))).drop("_first", "_end", "_rank")


def _copies_before_sql(count: int, ratio: Fraction, epoch: int) -> Column:
    """`copies_before` of `_rank`. Whole copies are taken out first: what is left is below 2 x count x denominator."""
    q = ratio.denominator
    whole, rest = divmod(epoch * ratio.numerator, q)
    return F.expr(f"(_rank * {q}L + {rest * count}L) div {count * q or 1}L + {whole}L")


def _ranked(rows: DataFrame, count: int, seed: int) -> DataFrame:
    """Add `_rank`, 0 to count - 1 in the order of (hash, sample_id).

    Rows are ranked within ranges of the hash, one task each, on top of the number of rows in the ranges before.
    """
    bits = (count // RANGE_ROWS).bit_length()
    ranges = 2 ** (bits + 1)  # Spark's hash has a sign: shifted right, it is one of -ranges / 2 ... ranges / 2 - 1
    hashed = rows.withColumn("_hash", F.xxhash64("sample_id", F.lit(seed)))
    hashed = hashed.withColumn("_range", F.shiftright("_hash", 63 - bits).cast("int") + F.lit(ranges // 2))
    sizes = dict(hashed.groupBy("_range").count().collect())  # one small row a range
    before = [sum(sizes.get(n, 0) for n in range(end)) for end in range(ranges)]
    order = Window.partitionBy("_range").orderBy("_hash", "sample_id")
    rank = F.row_number().over(order) - 1 + F.array(*map(F.lit, before))[F.col("_range")].cast("long")
    return hashed.withColumn("_rank", rank).drop("_hash", "_range")


def _id_in(path: str) -> Column:
    """Two data paths may both have a train.jsonl: their rows' sample_ids differ by the data path."""
    return F.xxhash64(F.lit(path), "sample_id").bitwiseAND(F.lit((1 << 63) - 1))


def _outputs(root: Folder, stage: str) -> list[tuple[str, Report]]:
    """Return (data path, report) of every finished output of `stage` in and below `root`, by path.

    A link whose target contains, or is in, what is looked through already (`latest -> charts`) is passed over: what is
    there would be sampled twice.
    """
    found: list[tuple[str, Report]] = []
    paths, links = [""], Links(root)
    while paths or links:
        path = paths.pop() if paths else links.take()
        if path is None:
            continue
        folder = root / path if path else root
        report = Report.load_if_there(folder)
        if report is not None and report.stage == stage:
            found.append((path or ONLY, report))
        for name in folder.names():
            if is_attempt(name) or (report is not None and name in _OWN_FOLDERS) or not folder.is_folder(name):
                continue
            below = f"{path}/{name}" if path else name
            if folder.stat(name).is_link:
                links.add(below)
            else:
                paths.append(below)
    return sorted(found, key=lambda output: output[0])
