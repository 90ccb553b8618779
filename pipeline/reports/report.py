"""The report of a stage: report.json, which marks finished work, and report.html, to be read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kanyun.errors import DatasetError, UserError
from kanyun.manifest import canonical, digest_of
from kanyun.storage import Folder
from pipeline.reports.page import render
from pipeline.schema import VERSIONS

REPORT = "report.json"
PAGE = "report.html"
IMAGES_A_ROW = "images a row"  # the title of their distribution, in all stages that look at images


@dataclass(frozen=True)
class RowCounts:
    """Rows through a stage: rows_in + added = rows_out + quarantined + dropped."""

    rows_in: int
    rows_out: int
    added: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)  # reason -> rows
    dropped: int = 0

    @property
    def lost(self) -> int:
        """Rows in quarantine."""
        return sum(self.quarantined.values())

    def check(self, what: str) -> None:
        """Raises DatasetError if a row is unaccounted for."""
        if self.rows_in + self.added != self.rows_out + self.lost + self.dropped:
            raise DatasetError(
                f"{what}: {self.rows_in} rows in + {self.added} added is not {self.rows_out} out + {self.lost} "
                f"quarantined + {self.dropped} dropped: a row was lost or its input changed; run the stages again"
            )

    def after(self, earlier: Sequence["RowCounts"]) -> "RowCounts":
        """Return the counts from the raw rows to here. earlier: from the raw rows to each input of this stage."""
        if not earlier:
            return self
        quarantined = dict(self.quarantined)
        for counts in earlier:
            for reason, rows in counts.quarantined.items():
                quarantined[reason] = quarantined.get(reason, 0) + rows
        return RowCounts(
            rows_in=sum(counts.rows_in for counts in earlier),
            rows_out=self.rows_out,
            added=self.added + sum(counts.added for counts in earlier),
            quarantined=dict(sorted(quarantined.items())),
            dropped=self.dropped + sum(counts.dropped for counts in earlier),
        )


@dataclass(frozen=True)
class Histogram:
    """Counts of values by size, in eighths of an octave.

    Bin 0 is of the value 0, bin 1 + 8 k + i of those in [2^k (1 + i / 8), 2^k (1 + (i + 1) / 8)).
    """

    title: str
    bins: dict[int, int]  # bin -> values in it
    least: int
    most: int
    mean: float

    # Spark SQL and numpy, in whole numbers: the bin of x >= 0.
    BIN_SQL = "if(x = 0, 0, 8 * length(bin(x)) + cast(shiftright(shiftleft(x, 3), length(bin(x)) - 1) as int) - 15)"

    @classmethod
    def of(cls, title: str, values: np.ndarray) -> "Histogram":
        """`values` [n] whole numbers, n > 0, below 2^50."""
        octave = np.frexp(np.maximum(values, 1))[1] - 1
        bins = np.where(values == 0, 0, 8 * octave + (values * 8 >> octave) - 7)
        numbers, counts = np.unique(bins, return_counts=True)
        return cls(
            title,
            dict(zip(numbers.tolist(), counts.tolist())),
            int(values.min()),
            int(values.max()),
            float(values.mean()),
        )

    @staticmethod
    def edges(number: int) -> tuple[int, int]:
        """Return [first, end) of the values in a bin; between small values some bins are empty."""
        if number == 0:
            return 0, 1
        octave, eighth = divmod(number - 1, 8)
        first, end = (-(-((8 + n) << octave) // 8) for n in (eighth, eighth + 1))
        return first, end

    def quantile(self, share: float) -> int:
        """Return the quantile at `share`, as exact as the bins: within 6 %."""
        numbers = sorted(self.bins)
        ranks = np.cumsum([self.bins[number] for number in numbers])
        first, end = self.edges(numbers[int(np.searchsorted(ranks, share * ranks[-1]))])
        return min(max((first + end - 1) // 2, self.least), self.most)


@dataclass(frozen=True)
class Example:
    """A row that was rejected."""

    where: str  # file @ position
    evidence: str
    raw: str  # the beginning of the raw row
    images: list[str] = field(default_factory=list)  # thumbnails, as data URIs


@dataclass(frozen=True)
class Report:
    stage: str
    settings: dict[str, Any]
    input: str  # digest of the input
    run: str  # unique to this run: a repeated run is different input to the next stage
    counts: RowCounts
    since_raw: RowCounts  # the same identity from the raw rows to this stage's output
    seconds: float  # wall time
    phases: dict[str, float] = field(default_factory=dict)  # phase -> seconds; together nearly all of them
    reasons: dict[str, int] = field(default_factory=dict)  # rows by reason; preprocess keeps them in data/
    examples: dict[str, list[Example]] = field(default_factory=dict)  # by reason
    distributions: list[Histogram] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # further figures of a stage (pack: fill, packs, ...)

    @property
    def digest(self) -> str:
        """Identifies the stage's output in the input digest of the next."""
        return digest_of(canonical([self.stage, self.settings, self.input, self.run]))

    @property
    def has_images(self) -> bool:
        """Whether the stage's rows have images, as far as it has looked."""
        return any(shown.title == IMAGES_A_ROW and shown.most > 0 for shown in self.distributions)

    def summary(self) -> str:
        counts = self.counts
        text = f"{counts.rows_in} rows in"
        for number, what in (
            (counts.added, "added"),
            (counts.lost, "quarantined"),
            (counts.dropped, "dropped"),
        ):
            text += f", {number} {what}" if number else ""
        if self.reasons and not counts.quarantined:
            text += f", {sum(self.reasons.values())} with a reason"
        return f"{text}, {counts.rows_out} out in {self.seconds:.1f} s"

    def save(self, folder: Folder) -> None:
        folder.write(PAGE, render("report.html", report=self).encode())
        values = json.loads(json.dumps(asdict(self)))  # as they will be read
        checked = {"checksum": digest_of(canonical(values)), **values}
        folder.write(REPORT, (json.dumps(checked, indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: Folder, stage: str) -> "Report":
        """Raises UserError if `folder` does not hold the finished output of `stage`."""
        report = cls.load_if_there(folder)
        if report is None or report.stage != stage:
            content = "no finished stage" if report is None else f"the output of {report.stage}"
            raise UserError(
                f"{folder.path} holds {content}, and an output of {stage} is needed: run `python -m pipeline {stage}` "
                "first and give its output"
            )
        version, needed = report.settings.get("version", 1), VERSIONS.get(stage, 1)
        if version != needed:
            raise UserError(
                f"{folder.path} holds rows of {stage} in version {version}, and version {needed} is needed: another "
                f"release wrote them; run `python -m pipeline {stage}` again with --overwrite"
            )
        return report

    @classmethod
    def load_if_there(cls, folder: Folder) -> "Report | None":
        """None if `folder` has no report. Raises DatasetError if its report is damaged."""
        if not folder.exists(REPORT):
            return None
        try:
            values = json.loads(folder.read(REPORT))
            if (checksum := values.pop("checksum")) != (actual := digest_of(canonical(values))):
                raise ValueError(f"checksum {checksum}, but its values give {actual}")
            values["distributions"] = [
                Histogram(**h | {"bins": {int(number): count for number, count in h["bins"].items()}})
                for h in values["distributions"]
            ]
            values["examples"] = {
                reason: [Example(**example) for example in examples] for reason, examples in values["examples"].items()
            }
            values |= {name: RowCounts(**values[name]) for name in ("counts", "since_raw")}
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"{folder.path}/{REPORT} is damaged ({error!r}): run its stage with --overwrite"
            ) from error
