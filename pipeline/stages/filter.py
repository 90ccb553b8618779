"""filter IN OUT: clean rows to data/, bad ones and exact duplicates to quarantine/; images that look alike are told."""

from dataclasses import dataclass
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from kanyun.errors import UserError
from pipeline.checks import Reason
from pipeline.schema import SAMPLE
from pipeline.stages.base import Attempt, Stage

# Rows that repeat others, about 100 B each: up to this many are sent to every executor, so that the rows themselves,
# texts and all, need not cross a shuffle.
BROADCAST_ROWS = 1_000_000
BANDS = 4  # of 16 bits in `looks`
EXAMPLES = 5  # pairs of images that look alike, shown in the report


@dataclass(frozen=True)
class FilterStage(Stage):
    """Of rows with the same content the one with the smallest (file, position) is kept.

    Images look alike if their `looks` differ in one band at most, and their bytes differ: the very same image under
    several questions is no near duplicate. Those rows are counted in the report, and quarantined only on demand.
    """

    name = "filter"
    after = "preprocess"
    schema = SAMPLE
    quarantines = True
    distributions = {  # noqa: RUF012
        "characters a row": "length(coalesce(text, concat_ws('', flatten(messages.content).text)))",
        "messages a row": "size(messages)",
        "images a row": "size(images)",
    }

    near_duplicates: str = "keep"  # keep | drop

    def settings(self) -> dict[str, Any]:
        if self.near_duplicates not in ("keep", "drop"):
            raise UserError(f"near_duplicates is {self.near_duplicates!r}: give keep or drop")
        return super().settings()

    def transform(self, rows: DataFrame, attempt: Attempt) -> DataFrame:
        rows = _without_duplicates(rows)
        return _without_alike(rows) if self.near_duplicates == "drop" else rows

    def seen(self, attempt: Attempt) -> dict[str, Any]:
        rows = alike(self._written(attempt.folder / "data")).cache()
        counted = rows.agg(F.count("*").alias("rows"), F.countDistinct("first").alias("firsts")).head()
        facts: dict[str, Any] = {"rows with an image that looks like one of an earlier row": counted["rows"]}
        facts["such earlier rows"] = counted["firsts"]
        for number, row in enumerate(rows.orderBy("place").limit(EXAMPLES).toLocalIterator(), start=1):
            pair = (f"{place.file} @ {place.position}" for place in (row["first"], row["place"]))
            facts[f"images that look alike, {number}"] = " and ".join(pair)
        return super().seen(attempt) | {"facts": facts}


def _without_duplicates(rows: DataFrame) -> DataFrame:
    repeated = (
        rows.where("reason is null")
        .groupBy("content_hash")
        .agg(F.min(_place()).alias("kept"), F.count("*").alias("times"))
        .where("times > 1")
    )
    duplicate = F.col("kept").isNotNull() & (F.col("kept") != _place())
    seen = F.format_string("the same content as %s @ %d, and %d times in all", "kept.file", "kept.position", "times")
    return _marked(rows.join(_small(repeated), "content_hash", "left"), duplicate, Reason.DUPLICATE, seen)


def _without_alike(rows: DataFrame) -> DataFrame:
    seen = F.format_string("an image that looks like one of %s @ %d", "first.file", "first.position")
    joined = rows.withColumn("place", _place()).join(_small(alike(rows.where("reason is null"))), "place", "left")
    return _marked(joined, F.col("first").isNotNull(), Reason.NEAR_DUPLICATE, seen)


def alike(rows: DataFrame) -> DataFrame:
    """(place, first): each row with an image that looks like another one, in an earlier row, and the earliest of them.

    An image has a key for each band, which is all but that band of its `looks`; those of equal keys look alike. Each
    is compared with the first one of its keys alone, so the work grows with the images and not with their pairs. A key
    of zeros stands for an even field, of which nothing can be said.
    """
    keys = (f"struct({band} as band, looks & ~shiftleft(65535L, {16 * band}) as rest)" for band in range(BANDS))
    images = rows.select(_place().alias("place"), F.explode("images").alias("image")).select("place", "image.*")
    keyed = images.selectExpr("place", "digest", f"explode(array({', '.join(keys)})) as key").where("key.rest != 0")
    firsts = (
        keyed.groupBy("key")
        .agg(
            F.min(F.struct("place", "digest")).alias("one"),
            F.max("digest").alias("last"),
            F.min("digest").alias("least"),
        )
        .where("last != least")
        .select("key", F.col("one.place").alias("first"), F.col("one.digest").alias("first_digest"))
    )
    others = keyed.join(_small(firsts), "key").where("place != first and digest != first_digest")
    return others.groupBy("place").agg(F.min("first").alias("first"))


def _place() -> Column:
    return F.struct("file", "position")


def _marked(rows: DataFrame, bad: Column, reason: Reason, evidence: Column) -> DataFrame:
    return rows.withColumn("reason", F.when(bad, F.lit(str(reason))).otherwise(F.col("reason"))).withColumn(
        "evidence", F.when(bad, evidence).otherwise(F.col("evidence"))
    )


def _small(rows: DataFrame) -> DataFrame:
    """Computed once, and sent to every executor if there are few."""
    rows = rows.cache()
    return F.broadcast(rows) if rows.count() <= BROADCAST_ROWS else rows
