"""Summaries of written rows for a report: examples of each reason, and distributions.

The driver collects a few rows a reason or a bin, and sorts them: Spark would sample, shuffle and compile for that.
"""

import base64
import posixpath
from collections.abc import Callable, Iterable

from pyspark.sql import DataFrame, Row, Window
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.images.blobs import thumbnail
from pipeline.reports.report import Example, Histogram, Report

EXAMPLES = 3  # rows shown a reason
IMAGES = 4  # of a row
SIDE = 96  # pixels; about 3 kB as JPEG, so a page with every reason stays below 0.5 MB
RAW_SHOWN = 300  # characters of a raw row
RAW_READ = 100_000  # to find its images in; longer rows are shown without


def reasons(rows: DataFrame) -> dict[str, int]:
    """Count the rows by reason."""
    counted = rows.where("reason is not null").groupBy("reason").count()
    return {row["reason"]: row["count"] for row in sorted(counted.collect())}


def examples(
    marked: DataFrame, images_of: Callable[[Row], Iterable[bytes]], earlier: Iterable[Report]
) -> dict[str, list[Example]]:
    """Return the first few rows of every reason, by file and position. Thumbnails of `earlier` reports are reused."""
    rank = F.row_number().over(Window.partitionBy("reason").orderBy("file", "position"))
    raw = F.substring("raw", 1, RAW_READ).alias("raw")
    rows = marked.where("reason is not null").select("reason", "file", "position", "evidence", "images", raw)
    pictures = {
        (reason, example.where): example.images
        for report in earlier
        for reason, shown in report.examples.items()
        for example in shown
    }
    result: dict[str, list[Example]] = {}
    ranked = rows.withColumn("rank", rank).where(F.col("rank") <= EXAMPLES)
    for row in sorted(ranked.collect(), key=lambda row: (row["reason"], row["rank"])):
        where = f"{row['file']} @ {row['position']}"
        images = pictures.get((row["reason"], where)) or _thumbnails(images_of(row))
        example = Example(where, row["evidence"], row["raw"][:RAW_SHOWN], images)
        result.setdefault(row["reason"], []).append(example)
    return result


def images_in_blobs(row: Row) -> Iterable[bytes]:
    """Yield a row's images by its refs; images that cannot be read are left out."""
    for ref in row["images"] or []:
        folder, name = posixpath.split(ref["blob"])
        try:
            yield Folder(folder).read(name, ref["offset"], ref["size"])
        except (UserError, FileNotFoundError):
            continue


def histograms(data: DataFrame, expressions: dict[str, str]) -> list[Histogram]:
    """Return the histograms of SQL expressions, in one pass over their columns.

    expressions: title -> SQL of a whole number >= 0, or of an array of them. Nulls do not count; an expression without
    values has no histogram.
    """
    if not expressions:
        return []
    types = [field.dataType for field in data.selectExpr(*expressions.values()).schema]
    arrays = [sql if isinstance(kind, ArrayType) else f"array({sql})" for sql, kind in zip(expressions.values(), types)]
    marked = [
        f"transform(coalesce({sql}, array()), x -> named_struct('part', {part}, 'x', cast(x as bigint)))"
        for part, sql in enumerate(arrays)
    ]
    values = data.selectExpr(f"inline(concat({', '.join(marked)}))").where("x is not null")
    counted = values.selectExpr("part", f"{Histogram.BIN_SQL} as number", "x").groupBy("part", "number")
    summed = counted.agg(F.count("*").alias("rows"), F.min("x").alias("least"), F.max("x").alias("most"), F.sum("x"))
    bins: dict[int, list[Row]] = {}
    for row in sorted(summed.collect(), key=lambda row: (row["part"], row["number"])):
        bins.setdefault(row["part"], []).append(row)
    titles = list(expressions)
    return [
        Histogram(
            title=titles[part],
            bins={row["number"]: row["rows"] for row in rows},
            least=rows[0]["least"],
            most=rows[-1]["most"],
            mean=sum(row["sum(x)"] for row in rows) / sum(row["rows"] for row in rows),
        )
        for part, rows in bins.items()
    ]


def _thumbnails(images: Iterable[bytes]) -> list[str]:
    thumbnails = []
    for _, data in zip(range(IMAGES), images):
        if (small := thumbnail(data, SIDE)) is not None:
            thumbnails.append(f"data:image/jpeg;base64,{base64.b64encode(small).decode()}")
    return thumbnails
