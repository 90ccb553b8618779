"""filter IN OUT: clean rows to data/, bad ones and exact duplicates to quarantine/."""

from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipeline.checks import Reason
from pipeline.schema import SAMPLE
from pipeline.stage import Attempt, Stage

# Contents that occur more than once, about 100 B each: up to this many are sent to every executor, so that the rows
# themselves, texts and all, need not cross a shuffle.
BROADCAST_ROWS = 1_000_000


@dataclass(frozen=True)
class Filter(Stage):
    """Of rows with the same content the one with the smallest (file, position) is kept."""

    name = "filter"
    after = "preprocess"
    schema = SAMPLE
    quarantines = True
    distributions = {  # noqa: RUF012
        "characters a row": "length(coalesce(text, concat_ws('', flatten(messages.content).text)))",
        "messages a row": "size(messages)",
        "images a row": "size(images)",
    }

    def transform(self, rows: DataFrame, attempt: Attempt) -> DataFrame:
        place = F.struct("file", "position")
        repeated = (
            rows.where("reason is null")
            .groupBy("content_hash")
            .agg(F.min(place).alias("kept"), F.count("*").alias("times"))
            .where("times > 1")
            .cache()
        )
        if repeated.count() <= BROADCAST_ROWS:
            repeated = F.broadcast(repeated)
        duplicate = F.col("kept").isNotNull() & (F.col("kept") != place)
        seen = F.format_string(
            "the same content as %s @ %d, and %d times in all", "kept.file", "kept.position", "times"
        )
        return (
            rows.join(repeated, "content_hash", "left")
            .withColumn("reason", F.when(duplicate, F.lit(str(Reason.DUPLICATE))).otherwise(F.col("reason")))
            .withColumn("evidence", F.when(duplicate, seen).otherwise(F.col("evidence")))
        )
