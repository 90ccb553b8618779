"""What a stage leaves beside its rows: report.json (the mark of finished work) and report.html (for people)."""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kanyun.errors import DatasetError, UserError
from kanyun.manifest import canonical, digest_of
from kanyun.storage import Folder

REPORT = "report.json"
PAGE = "report.html"


@dataclass(frozen=True)
class Counts:
    """Rows through a stage: rows_in + added = rows_out + quarantined + dropped."""

    rows_in: int
    rows_out: int
    added: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)  # reason -> rows
    dropped: int = 0

    def check(self, what: str) -> None:
        """Raises DatasetError if a row is unaccounted for."""
        quarantined = sum(self.quarantined.values())
        if self.rows_in + self.added != self.rows_out + quarantined + self.dropped:
            raise DatasetError(
                f"{what}: {self.rows_in} rows in + {self.added} added is not {self.rows_out} out + {quarantined} "
                f"quarantined + {self.dropped} dropped: a row was lost or its input changed; run the stages again"
            )

    def after(self, earlier: Sequence["Counts"]) -> "Counts":
        """Counts from the raw rows to here, given those from the raw rows to each input of this stage."""
        if not earlier:
            return self
        quarantined = dict(self.quarantined)
        for counts in earlier:
            for reason, rows in counts.quarantined.items():
                quarantined[reason] = quarantined.get(reason, 0) + rows
        return Counts(
            rows_in=sum(counts.rows_in for counts in earlier),
            rows_out=self.rows_out,
            added=self.added + sum(counts.added for counts in earlier),
            quarantined=dict(sorted(quarantined.items())),
            dropped=self.dropped + sum(counts.dropped for counts in earlier),
        )


@dataclass(frozen=True)
class Histogram:
    """Rows by size of a value: bins[b] rows have a value in [2^(b-1), 2^b), bins[0] have zero."""

    title: str
    bins: dict[int, int]


@dataclass(frozen=True)
class Report:
    stage: str
    settings: dict[str, Any]
    input: str  # digest of the input
    run: str  # of this very run: done again, it is other input to the next stage
    counts: Counts
    since_raw: Counts  # the same identity from the raw rows to this stage's output
    seconds: float
    reasons: dict[str, int] = field(default_factory=dict)  # rows by reason; preprocess keeps them in data/
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # reason -> where, evidence, raw
    distributions: list[Histogram] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # what else this stage tells (pack: fill, packs, ...)

    @property
    def digest(self) -> str:
        """Stands for the stage's output in the input digest of the next."""
        return digest_of(canonical([self.stage, self.settings, self.input, self.run]))

    def summary(self) -> str:
        counts = self.counts
        text = f"{counts.rows_in} rows in"
        for number, what in (
            (counts.added, "added"),
            (sum(counts.quarantined.values()), "quarantined"),
            (counts.dropped, "dropped"),
        ):
            text += f", {number} {what}" if number else ""
        if self.reasons and not counts.quarantined:
            text += f", {sum(self.reasons.values())} with a reason"
        return f"{text}, {counts.rows_out} out in {self.seconds:.1f} s"

    def save(self, folder: Folder) -> None:
        folder.write(PAGE, page(self).encode())
        folder.write(REPORT, (json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: Folder, stage: str) -> "Report":
        """Raises UserError if `folder` does not hold the finished output of `stage`."""
        report = cls.load_if_there(folder)
        if report is None or report.stage != stage:
            found = "no finished stage" if report is None else f"the output of {report.stage}"
            raise UserError(
                f"{folder.path} holds {found}, and an output of {stage} is needed: run `python -m pipeline {stage}` "
                "first and give its output"
            )
        return report

    @classmethod
    def load_if_there(cls, folder: Folder) -> "Report | None":
        """None if `folder` has no report. Raises DatasetError if its report is damaged."""
        if not folder.exists(REPORT):
            return None
        try:
            values = json.loads(folder.read(REPORT))
            bins = [({int(b): n for b, n in h["bins"].items()}, h["title"]) for h in values["distributions"]]
            values["distributions"] = [Histogram(title, counted) for counted, title in bins]
            values |= {name: Counts(**values[name]) for name in ("counts", "since_raw")}
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"{folder.path}/{REPORT} is damaged ({error!r}): run its stage again with --overwrite"
            ) from error


def page(report: Report) -> str:
    """One HTML file without anything from elsewhere."""
    counts = report.counts
    rows = {
        "rows in": counts.rows_in,
        "added": counts.added,
        "quarantined": sum(counts.quarantined.values()),
        "dropped": counts.dropped,
        "rows out": counts.rows_out,
        "raw rows so far": report.since_raw.rows_in,
        "seconds": report.seconds,
    }
    facts = report.settings | {"input": report.input}
    body = [f"<h1>{html.escape(report.stage)}</h1>", _table(rows), _bars("rows by reason", report.reasons)]
    body += [_bars(h.title, _named_bins(h)) for h in report.distributions]
    for reason, examples in report.examples.items():
        body.append(f"<h2>{html.escape(reason)}</h2>")
        body += [
            f"<p><b>{html.escape(e['where'])}</b> {html.escape(e['evidence'])}</p><pre>{html.escape(e['raw'])}</pre>"
            for e in examples
        ]
    if report.facts:
        body.insert(2, _table(report.facts))
    body += ["<h2>settings</h2>", _table(facts)]
    return _PAGE.replace("TITLE", html.escape(report.stage)).replace("BODY", "\n".join(body))


def _named_bins(histogram: Histogram) -> dict[str, int]:
    if not histogram.bins:
        return {}
    bits = range(min(histogram.bins), max(histogram.bins) + 1)
    return {(f"{1 << b - 1} - {(1 << b) - 1}" if b else "0"): histogram.bins.get(b, 0) for b in bits}


def _table(values: dict[str, Any]) -> str:
    cells = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(_number(value))}</td></tr>" for name, value in values.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _bars(title: str, values: dict[str, int]) -> str:
    """Horizontal bars as inline SVG: a line a value, 20 px high."""
    if not values:
        return ""
    longest = max(max(values.values()), 1)
    lines = [
        f'<text x="190" y="{20 * n + 14}" text-anchor="end">{html.escape(name)}</text>'
        f'<rect x="200" y="{20 * n + 3}" width="{max(value / longest * 300, 1 if value else 0):.1f}" height="14"/>'
        f'<text x="{205 + value / longest * 300:.1f}" y="{20 * n + 14}">{value:,}</text>'
        for n, (name, value) in enumerate(values.items())
    ]
    view = f'viewBox="0 0 600 {20 * len(values)}"'
    return f"<h2>{html.escape(title)}</h2><svg {view} role='img'>{''.join(lines)}</svg>"


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>TITLE</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem }
th { text-align: left; font-weight: normal; color: #666; padding-right: 1.5rem } td { overflow-wrap: anywhere }
svg { width: 100%; max-width: 600px; font-size: 12px } rect { fill: #4878a8 }
pre { background: #f4f4f4; padding: .5rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px }
</style>
BODY
</html>
"""
