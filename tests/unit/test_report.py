"""Histograms, what their charts show, and the page as a browser gets it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanyun.storage import Folder
from pipeline.flow import Done, links, write_index
from pipeline.reports.page import Chart, duration, render, share, short
from pipeline.reports.report import Example, Histogram, Report, RowCounts

values = st.lists(st.integers(0, 2**45), min_size=1, max_size=60).map(np.array)


@given(values)
def test_every_value_is_in_its_bin(numbers: np.ndarray) -> None:
    histogram = Histogram.of("made", numbers)
    for bin, count in histogram.bins.items():
        first, end = Histogram.edges(bin)
        assert count == ((numbers >= first) & (numbers < end)).sum()
        assert end - first <= max(1, first / 8)  # an eighth of an octave
    assert sum(histogram.bins.values()) == len(numbers)
    assert (histogram.least, histogram.most) == (numbers.min(), numbers.max())


@given(values, st.sampled_from([0.01, 0.5, 0.99, 1.0]))
def test_quantiles_are_within_6_percent(numbers: np.ndarray, wanted: float) -> None:
    exact = int(np.quantile(numbers, wanted, method="inverted_cdf"))
    assert abs(Histogram.of("made", numbers).quantile(wanted) - exact) <= exact / 16


@given(values)
def test_bars_stand_beside_one_another(numbers: np.ndarray) -> None:
    chart = Chart.of(Histogram.of("made", numbers))
    assert len(chart.bars) == len(Histogram.of("made", numbers).bins)
    ends = [0.0]
    for bar in chart.bars:
        assert bar.left >= ends[-1] - 1e-6
        assert bar.width > 0
        ends.append(bar.left + bar.width)
    assert ends[-1] <= 100 + 1e-6
    assert max(bar.height for bar in chart.bars) == 100
    assert all(0 <= at <= 100 for at, _ in chart.ticks)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (short(950), "950"),
        (short(1024), "1,024"),
        (short(2.345), "2.35"),
        (short(65536), "65.5k"),
        (short(999_999), "1000k"),
        (short(1.5e6), "1.5M"),
        (duration(4.06), "4.1 s"),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 05 min"),
        (share(1, 3), "33.33 %"),
        (share(1, 10**9), "< 0.01 %"),
        (share(10**9 - 1, 10**9), "> 99.99 %"),
        (share(5, 5), "100 %"),
    ],
)
def test_numbers_for_people(text: str, wanted: str) -> None:
    assert text == wanted


def test_the_page_escapes_what_rows_say_and_needs_no_network() -> None:
    counts = RowCounts(3, 1, 0, {"malformed_row": 2}, 0)
    example = Example(
        "<b>.jsonl @ 0",
        "no JSON: <script>alert(1)</script>",
        '{"a": "</pre><img src=x>"}',
        ["data:image/jpeg;base64,AA=="],
    )
    reasons = {"malformed_row": 2}
    report = Report(
        "filter", {}, "in", "run", counts, counts, 2.0, {"count": 1.0}, reasons, {"malformed_row": [example]}
    )
    page = render("report.html", report=report)
    assert "<script" not in page
    assert "<b>.jsonl" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert re.findall(r'(?:src|href)="(.*?)"', page) == ["#malformed_row", "data:image/jpeg;base64,AA=="]
    assert "3 in + 0 added = 1 out +\n  2 quarantined + 0 dropped" in page


def run_with_losses() -> list[Done]:
    """Two data paths through all stages, with every way in and out."""

    def done(folder: str, stage: str, counts: RowCounts, path: str = "", facts: dict[str, int] | None = None) -> Done:
        return Done(folder, Report(stage, {"length": 8}, "in", "run", counts, counts, 1.0, facts=facts or {}), path)

    return [
        done("preprocess/a b", "preprocess", RowCounts(100, 100), "a b"),
        done("filter/a b", "filter", RowCounts(100, 88, 0, {"duplicate": 10, "image_missing": 2}), "a b"),
        done("preprocess/c", "preprocess", RowCounts(40, 40), "c"),
        done("filter/c", "filter", RowCounts(40, 40), "c"),
        done("sample", "sample", RowCounts(128, 148, 50, {}, 30)),
        done("build", "build", RowCounts(148, 150, 5, {"too_long": 3})),
        done("packed/p", "pack", RowCounts(150, 150), facts={"packs": 20, "tokens": 120}),
    ]


def imbalance(run: list[Done]) -> dict[tuple[str, str], int]:
    """Node -> rows in less rows out, where that is not 0."""
    found = {done.node: 0 for done in run}
    for link in links(run):
        for node, sign in ((link.target, 1), (link.source, -1)):
            if node:
                found[node] += sign * link.rows
    return {node: rows for node, rows in found.items() if rows}


def test_what_flows_into_a_node_flows_out_of_it() -> None:
    run = run_with_losses()
    assert imbalance(run) == {}
    ends = [link for link in links(run) if not link.source or not link.target]
    assert sum(link.rows for link in ends if not link.source) == 140 + 55
    ways_out = {link.what for link in ends if not link.target}
    assert ways_out == {"duplicate", "image_missing", "dropped", "too_long", "packed"}
    lost = replace(run[1], report=replace(run[1].report, counts=RowCounts(100, 87, 0, {"duplicate": 13})))
    assert imbalance([run[0], lost, *run[2:]]) == {("sample", ""): -1}


def test_index_links_to_every_report(tmp_path: Path) -> None:
    run = run_with_losses()
    write_index(Folder(str(tmp_path / "my run")), run)
    page = (tmp_path / "my run" / "index.html").read_text()
    assert re.findall('href="(.*?)"', page) == [f"{done.folder.replace(' ', '%20')}/report.html" for done in run]
    node_widths = [float(w) for w in re.findall(r'class="node" d="M.*?H([\d.]+)', page)]
    assert max(node_widths) <= 100
    assert "nan" not in page
