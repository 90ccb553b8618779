"""filter IN OUT: clean rows to data/, bad ones and exact duplicates to quarantine/; near duplicates are counted."""

from dataclasses import dataclass
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from kanyun.errors import UserError
from pipeline.checks import Reason
from pipeline.reports.report import IMAGES_A_ROW
from pipeline.schema import SAMPLE
from pipeline.stages.base import Attempt, Stage

# Keys of repeated rows, about 100 B each: up to this many are broadcast, so that the rows themselves do not cross a
# shuffle.
BROADCAST_ROWS = 1_000_000
BANDS = 4  # of 16 bits in `looks`
EXAMPLES = 5  # pairs of images that look alike, shown in the report


@dataclass(frozen=True)
class FilterStage(Stage):
    """Of rows with equal content the one with the smallest (file, position) is kept.

    Images are near duplicates if their hashes (`looks`, a 64-bit dHash) differ in at most one band while their bytes
    differ: one image under several questions is no near duplicate. The report counts these rows; they are quarantined
    only with near_duplicates="drop".
    """

    name = "filter"
    after = "preprocess"
    schema = SAMPLE
    quarantines = True
    distributions = {  # noqa: RUF012
        "characters a row": "length(coalesce(text, concat_ws('', flatten(messages.content).text)))",
        "messages a row": "size(messages)",
        IMAGES_A_ROW: "size(images)",
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
        lines: dict[str, Any] = {"rows with an image that looks like one of an earlier row": counted["rows"]}
        lines["such earlier rows"] = counted["firsts"]
        for number, row in enumerate(rows.orderBy("place").limit(EXAMPLES).toLocalIterator(), start=1):
            pair = (f"{place.file} @ {place.position}" for place in (row["first"], row["place"]))
            lines[f"images that look alike, {number}"] = " and ".join(pair)
        return super().seen(attempt) | {"facts": lines}


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
    """Return (place, first): each row with a near duplicate of an image in an earlier row, and the earliest such row.

    An image has a key for each band: all other bits of its hash. Images with an equal key are near duplicates. Each is
    compared with the first image of its keys alone, so the work is linear in images. A key of zeros is an even
    picture and is ignored.
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
    """Cache `rows`, and broadcast them if there are at most BROADCAST_ROWS."""
    rows = rows.cache()
    return F.broadcast(rows) if rows.count() <= BROADCAST_ROWS else rows
