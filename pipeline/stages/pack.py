"""pack: tokens, masks and image bytes into packs of a fixed length. The output is a finished kanyun dataset.

A hash of (sample_id, copy, piece, seed) assigns the samples to buckets; one bucket is one task and one shard. The
number of buckets follows from totals alone, and a task sorts its samples before it plans, so the bytes are the same for
any partitioning. Image bytes do not pass through Spark: the task that writes a pack reads them from the blobs.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from kanyun import manifest
from kanyun.errors import DatasetError, UserError
from kanyun.fingerprint import copy_tokenizer, fingerprint
from kanyun.naming import dataset_name
from kanyun.reader import PackedDataset
from kanyun.storage import Folder
from kanyun.writer import ShardResult, publish
from pipeline.encoder import IMAGE_TOKENS
from pipeline.reports.report import Histogram, Report, RowCounts
from pipeline.schema import BUILT
from pipeline.spark import map_rows
from pipeline.stages import bin_packing
from pipeline.stages.base import Attempt, Stage
from pipeline.stages.build import TOKENIZER
from pipeline.stages.shard import TASK_ROW, Job, repeated_id, where, write_shard
from pipeline.tokenizer_settings import END_OF_DOCUMENT


@dataclass(frozen=True)
class PackStage(Stage):
    """`output` is the packed dataset's own folder; see `below`."""

    name, after, schema = "pack", "build", BUILT
    # A bucket's tokens are in memory at 5 bytes each (320 MB at most).
    bucket_samples: ClassVar[int] = 100_000
    bucket_tokens: ClassVar[int] = 64_000_000
    bucket_image_bytes: ClassVar[int] = 8 << 30

    length: int
    part: int = 0
    epoch: int = 0
    vision_budget: int | None = None  # patches a pack; None = 1.3 x mean demand

    @classmethod
    def below(
        cls,
        source: str,
        parent: str,
        length: int,
        part: int = 0,
        epoch: int | None = None,
        vision_budget: int | None = None,
    ) -> "PackStage":
        """Return the stage that writes `parent`/packed_length_...; `epoch` is the one that was sampled.

        Raises UserError if `source` was built for another length or sampled for another epoch.
        """
        built = Report.load(Folder(source), cls.after).settings
        for what, value, earlier in (("--length", length, built["length"]), ("--epoch", epoch, built["epoch"])):
            if value is not None and value != earlier:
                stage = "build" if what == "--length" else "sample"
                raise UserError(
                    f"{what} is {value}, but {source} comes from {stage} with {what} {earlier}: give the same"
                )
        name = dataset_name(length, part, built["epoch"])
        return cls(source, (Folder(parent) / name).uri, length, part, built["epoch"], vision_budget)

    @classmethod
    def for_command(cls, source: str, output: str, **settings: Any) -> "PackStage":
        return cls.below(source, output, **settings)

    def transform(self, rows: DataFrame, attempt: Attempt) -> DataFrame:
        return rows

    def write(self, rows: DataFrame, attempt: Attempt) -> RowCounts:
        built, tokenizer = attempt.inputs["."], Folder(self.source) / TOKENIZER
        seed, model = built.settings["seed"], fingerprint(tokenizer)
        with attempt.timed("add up sizes"):
            totals = _Totals.of(rows)
        with attempt.timed("check sample ids"):
            refuse_shared_ids(rows)
        if not totals.samples:
            raise UserError(f"{self.source} has no samples: all rows were quarantined or dropped; see its report.html")
        mean_demand = totals.sum_patches / totals.sum_tokens * self.length
        budget = choose_vision_budget(mean_demand, totals.largest, self.vision_budget)
        buckets, pad = self._buckets(totals), model.token_ids[END_OF_DOCUMENT]
        bucket = F.pmod(F.xxhash64("sample_id", "copy", "piece", F.lit(seed)), F.lit(buckets)).cast("int")
        job = Job(attempt.folder.uri, buckets, self.length, budget, seed, pad)
        with attempt.timed("shuffle, plan and write shards"):
            written = map_rows(rows.repartitionById(buckets, bucket), partial(write_shard, job=job), TASK_ROW).collect()
        counts = RowCounts(attempt.rows_in, sum(row["samples"] for row in written))
        copy_tokenizer(tokenizer, attempt.folder / TOKENIZER)
        publish(
            attempt.folder,
            [ShardResult.from_row(row) for row in written],
            length=self.length,
            vision_budget=budget,
            part=self.part,
            epoch=self.epoch,
            seed=seed,
            ratios=built.settings["ratios"],
            counts=_counts_since_raw(built, counts.rows_out),
            packs_lower_bound=totals.lower_bound(self.length, budget),
            tokenizer=model.digest,
            processor=model.processor,
            pad_token_id=pad,
            code_version=manifest.code_version(),
            image_token_id=model.token_ids[IMAGE_TOKENS[0]] if model.processor else None,
        )
        return counts

    def seen(self, attempt: Attempt) -> dict[str, Any]:
        packed = manifest.Manifest.load(attempt.folder)
        figures = {
            "packs": packed.packs,
            "lower bound of packs": packed.packs_lower_bound,
            "bound / packs": round(packed.packs_lower_bound / packed.packs, 5),
            "fill": round(packed.fill, 5),
            "shards": len(packed.shards),
            "tokens": packed.tokens,
            "patches": packed.patches,
            "vision budget": packed.vision_budget,
            "content digest": packed.content_digest,
        }
        patches = PackedDataset(attempt.folder).pack_patches
        filled = [Histogram.of("patches a pack", patches)] if packed.patches else []
        return {"facts": figures, "distributions": filled}

    def _buckets(self, totals: "_Totals") -> int:
        return max(
            math.ceil(totals.samples / self.bucket_samples),
            math.ceil(totals.sum_tokens / self.bucket_tokens),
            math.ceil(totals.image_bytes / self.bucket_image_bytes),
        )


def refuse_shared_ids(rows: DataFrame) -> None:
    """Raise DatasetError if two different rows have one sample_id. 24 bytes a sample cross the shuffle."""
    place = F.xxhash64("dataset", "file", "position")
    ends = rows.select("sample_id", place.alias("place")).groupBy("sample_id").agg(F.min("place"), F.max("place"))
    if shared := ends.where("min(place) != max(place)").orderBy("sample_id").head():
        same = rows.where(F.col("sample_id") == shared["sample_id"]).select("dataset", "file", "position").distinct()
        one, other = same.orderBy("dataset", "file", "position").take(2)
        raise DatasetError(repeated_id(shared["sample_id"], where(one), where(other)))


@dataclass(frozen=True)
class _Totals:
    """Sizes of all samples, counted before they are assigned to buckets: small for any number of samples."""

    tokens: tuple[np.ndarray, np.ndarray]  # sizes, and the number of samples of each size: at most `length` sizes
    patches: tuple[np.ndarray, np.ndarray]
    image_bytes: int

    @classmethod
    def of(cls, rows: DataFrame) -> "_Totals":
        image_bytes = rows.select(F.expr("aggregate(images, 0L, (sum, image) -> sum + image.size)").alias("bytes"))
        return cls(_sizes(rows, "tokens"), _sizes(rows, "patches"), image_bytes.agg(F.sum("bytes")).first()[0] or 0)

    @property
    def largest(self) -> int:
        """Patches of the sample with most of them."""
        return int(self.patches[0].max())

    @property
    def samples(self) -> int:
        return int(self.tokens[1].sum())

    @property
    def sum_tokens(self) -> int:
        return int(self.tokens[0] @ self.tokens[1])

    @property
    def sum_patches(self) -> int:
        return int(self.patches[0] @ self.patches[1])

    def lower_bound(self, length: int, vision_budget: int) -> int:
        budgets = [(self.tokens, length), (self.patches, vision_budget)]
        return max(bin_packing.bound(sizes, counts, capacity) for (sizes, counts), capacity in budgets if capacity)


def _counts_since_raw(built: Report, packed: int) -> manifest.Counts:
    """Return the counts from the raw rows to the packs: they reveal a row that any stage lost."""
    counts = built.since_raw
    quarantined = sum(counts.quarantined.values())
    return manifest.Counts(counts.rows_in, packed, counts.added, quarantined, counts.dropped)


def _sizes(rows: DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    counted = rows.groupBy(column).count().collect()
    sizes, counts = np.array([tuple(row) for row in counted], np.int64).reshape(-1, 2).T
    return sizes, counts


def choose_vision_budget(mean_demand: float, largest: int, requested: int | None) -> int:
    """Return the patches that a pack may have.

    mean_demand: patches in a pack full of average samples; largest: patches of the largest sample.

    Raises UserError if `requested` is too small to fill packs.
    """
    if largest == 0:
        return 0
    if requested is None:
        step = bin_packing.VISION_BUDGET_STEP
        return math.ceil(max(largest, bin_packing.DEFAULT_VISION_SLACK * mean_demand) / step) * step
    least = max(largest, math.ceil(bin_packing.MIN_VISION_SLACK * mean_demand))
    if requested < least:
        raise UserError(
            f"--vision-budget is {requested} patches, and the least that fills packs is {least}: the largest sample "
            f"has {largest}, and {bin_packing.MIN_VISION_SLACK} x the mean demand of a pack is "
            f"{bin_packing.MIN_VISION_SLACK * mean_demand:.0f}; give {least} or more, or leave it out"
        )
    return requested
