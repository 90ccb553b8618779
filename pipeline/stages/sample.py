"""sample: how many copies of each row go into one epoch, by the ratio of its data path.

In each data path the N samples stand in the order of a hash of (sample_id, seed), and U = rank / N spreads them evenly
over [0, 1). A sample's copies in epoch e are floor(U + (e + 1) R) - floor(U + e R), in whole numbers. So for any ratio
R, any seed and any partitioning, after any number of epochs E
- a sample has been used E x R times, less than one copy more or less: at R = 0.1 all had their turn after ten epochs;
- a data path has given floor(N x E x R) copies: floor(x) + floor(x + 1/N) + ... = floor(N x), by Hermite.
Were U the hash itself, totals would miss by about sqrt(N) / 2: 500 copies an epoch of a million samples.
All of it is Spark SQL: rows do not enter Python, and a whole ratio costs no shuffle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Any

import yaml
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.constants import SAMPLE_RATIO_BY_DATA_PATH
from pipeline.reports.report import REPORT, Report
from pipeline.schema import SAMPLE, SAMPLED
from pipeline.stages.base import Attempt, Stage

RANGE_ROWS = 100_000  # rows of a hash range, which one task puts in order


@dataclass(frozen=True)
class SampleStage(Stage):
    """`source` is one output of filter, or a folder with several below it: each one's path below is its data path."""

    name, after, schema = "sample", "filter", SAMPLED

    epoch: int = 0
    seed: int = 0
    ratios: str | None = None  # YAML file of `data path: ratio`, in place of constants.SAMPLE_RATIO_BY_DATA_PATH

    def inputs(self) -> dict[str, Report]:
        root = Folder(self.source)
        found = {".": Report.load(root, self.after)} if root.exists(REPORT) else dict(_below(root, self.after))
        if not found:
            raise UserError(
                f"no finished output of filter in or below {root.path}: run `python -m pipeline filter` first"
            )
        return found

    def settings(self) -> dict[str, Any]:
        ratios = {path: str(ratio) for path, ratio in self._ratios(self.inputs()).items()}
        return {"epoch": self.epoch, "seed": self.seed, "ratios": ratios}

    def read(self, spark: SparkSession, attempt: Attempt) -> DataFrame:
        ratios, sampled = self._ratios(attempt.inputs), []
        for path, report in attempt.inputs.items():
            folder = Folder(self.source) if path == "." else Folder(self.source) / path
            rows = spark.read.parquet((folder / "data").uri).select(*SAMPLE.names)
            if path != ".":
                rows = rows.withColumn("dataset", F.lit(path))
            sampled.append(take(rows, report.counts.rows_out, ratios[path], self.epoch, self.seed))
        return reduce(DataFrame.unionByName, sampled)

    def transform(self, rows: DataFrame, attempt: Attempt) -> DataFrame:
        return rows

    def added_and_dropped(self, written: DataFrame, rows_in: int) -> tuple[int, int]:
        """Computed, not counted: so the identity of the counts shows whether Spark sampled as promised."""
        inputs = self.inputs()
        added = dropped = 0
        for path, ratio in self._ratios(inputs).items():
            rows = inputs[path].counts.rows_out
            copies = int(rows * (self.epoch + 1) * ratio) - int(rows * self.epoch * ratio)
            used = rows if ratio >= 1 else copies  # below 1 nobody has two copies in an epoch, from 1 on nobody none
            added, dropped = added + copies - used, dropped + rows - used
        return added, dropped

    def _ratios(self, inputs: Mapping[str, Report]) -> dict[str, Fraction]:
        table = SAMPLE_RATIO_BY_DATA_PATH if self.ratios is None else read_ratios(self.ratios)
        return ratios_for(list(inputs), table)


def copies_before(rank: int, count: int, ratio: Fraction, epoch: int) -> int:
    """Copies of the sample at `rank` of `count` in all epochs before `epoch`: floor(rank / count + epoch x ratio)."""
    p, q = ratio.numerator, ratio.denominator
    return (rank * q + epoch * p * count) // (count * q)


def take(rows: DataFrame, count: int, ratio: Fraction, epoch: int, seed: int) -> DataFrame:
    """The `count` rows of a data path, each as often as `epoch` has it, with a column `copy`: the how-manieth of the
    sample's copies it is, over all epochs. The same as `copies_before` says."""
    if ratio.denominator == 1:  # as many copies of each: no need to rank
        first, end = F.lit(epoch * int(ratio)), F.lit((epoch + 1) * int(ratio))
    else:
        rows = _ranked(rows, count, seed)
        p, q = ratio.numerator, ratio.denominator
        first, end = (F.expr(f"(_rank * {q}L + {e * p * count}L) div {count * q or 1}L") for e in (epoch, epoch + 1))
    rows = rows.withColumn("_first", first.cast("int")).withColumn("_end", end.cast("int")).where("_first < _end")
    return rows.withColumn("copy", F.explode(F.expr("sequence(_first, _end - 1)"))).drop("_first", "_end", "_rank")


def _ranked(rows: DataFrame, count: int, seed: int) -> DataFrame:
    """`rows` with `_rank`, 0 to count - 1 in the order of (hash, sample_id): ranked within ranges of the hash, one task
    each, on top of the number of rows in the ranges before."""
    bits = (count // RANGE_ROWS).bit_length()
    ranges = 2 ** (bits + 1)  # Spark's hash has a sign: shifted right, it is one of -ranges / 2 ... ranges / 2 - 1
    hashed = rows.withColumn("_hash", F.xxhash64("sample_id", F.lit(seed)))
    hashed = hashed.withColumn("_range", F.shiftright("_hash", 63 - bits).cast("int") + F.lit(ranges // 2))
    sizes = dict(hashed.groupBy("_range").count().collect())  # one small row a range
    before = [sum(sizes.get(n, 0) for n in range(end)) for end in range(ranges)]
    order = Window.partitionBy("_range").orderBy("_hash", "sample_id")
    rank = F.row_number().over(order) - 1 + F.array(*map(F.lit, before))[F.col("_range")].cast("long")
    return hashed.withColumn("_rank", rank).drop("_hash", "_range")


def read_ratios(file: str) -> dict[str, Any]:
    """A YAML file of `data path: ratio`. Raises UserError if it is not there or is something else."""
    folder, name = Folder(file).parent, Folder(file).name
    if not folder.exists(name):
        raise UserError(f"there is no file {file}: give --ratios a YAML file of `data path: ratio` lines")
    try:
        table = yaml.safe_load(folder.read(name))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML ({error}): write one `data path: ratio` a line") from error
    if not isinstance(table, dict) or not table:
        raise UserError(f"{file} holds no ratios: write one `data path: ratio` a line")
    return {str(path): ratio for path, ratio in table.items()}


def ratios_for(paths: Sequence[str], table: Mapping[str, Any]) -> dict[str, Fraction]:
    """The ratio of each data path; with an empty table, 1.

    Raises UserError if the table has ratios, but not for all paths.
    """
    missing = [path for path in paths if path not in table]
    if table and missing:
        known = ", ".join(f"{path}: {ratio}" for path, ratio in sorted(table.items()))
        raise UserError(
            f"no sampling ratio for data path {', '.join(missing)}; ratios are known for {known}: "
            "add the missing ones (0 leaves a path out)"
        )
    return {path: ratio_of(path, table.get(path, 1)) for path in paths}


def ratio_of(path: str, value: Any) -> Fraction:
    """A ratio as written, exactly: 0.1 is 1/10. Denominators go up to a million, so 0.3333333333 is 1/3.

    Raises UserError if it is not a number from 0 to 1000.
    """
    try:
        ratio = Fraction(str(value)).limit_denominator(1_000_000)
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(-1)
    if not 0 <= ratio <= 1000:
        raise UserError(f"the sampling ratio of {path} is {value!r}, not a number from 0 to 1000: correct it")
    return ratio


def _below(folder: Folder, stage: str, path: str = "") -> list[tuple[str, Report]]:
    """(data path, report) of every finished output of `stage` below `folder`, by path."""
    found = []
    for name in folder.names():
        child = folder / name
        if name.startswith(("_", ".")) or not child.is_folder():
            continue
        report = Report.load_if_there(child)
        if report is None:
            found += _below(child, stage, f"{path}{name}/")
        elif report.stage == stage:
            found.append((f"{path}{name}", report))
    return found
