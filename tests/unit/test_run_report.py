"""report.html of runs: what is drawn is what metrics.jsonl says, also of a run that is still writing."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from kanyun.storage import Folder
from tests.support.training_job import ROOT
from trainer.metrics import Metrics, StepMetrics
from trainer.report.charts import Axis, Chart, Line, text
from trainer.report.history import POINTS, History, Point
from trainer.report.page import page

EVIL = "</script><b>数据"


def line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "steps": 50,
        "loss": 10.0 / step,
        "lr": 1e-4,
        "grad_norm": 1.0,
        "skipped": 0,
        "tokens_per_second": 100.0,
        "mfu": None,
        "data_wait": 0.01,
        "data_wait_mean": 0.01,
        "slowest_rank": 0,
        "work_seconds": 1.9,
        "work_seconds_mean": 1.9,
        "imbalance": 1.0,
        "seconds": 2.0,
        "memory_gb": 3.0,
        "validation_loss": 20.0 / step if step % 10 == 0 else None,
        "events": ["save"] if step % 20 == 0 else [],
        "loss_by_dataset": {"wiki": 9.0 / step, EVIL: 11.0 / step},
        "tokens_by_dataset": {"wiki": 5, EVIL: 5},
        "validation_loss_by_dataset": {},
    } | changes


def write(folder: Path, lines: list[dict[str, Any]], end: str = "") -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines) + end)
    (folder / "run.json").write_text(json.dumps({"lr": 1e-4, "output": str(folder)}))
    return str(folder)


class Elements(HTMLParser):
    """All elements with their attributes, and the text of the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and data.strip():
            self.scripts.append(data)


def test_a_run_that_is_still_writing_is_drawn_up_to_its_last_whole_line(tmp_path: Path) -> None:
    lines = [line(step) for step in range(1, 31)]
    lines[4] |= {"grad_norm": None, "skipped": 1}
    lines[5:] = [values | {"skipped": 1} for values in lines[5:]]
    lines[9]["events"] = ["stop", "save"]
    run = History.read(write(tmp_path / "run", lines, end='{"step": 31, "lo'))
    assert run.last["step"] == 30
    assert list(run.column("grad_norm").steps)[3:5] == [4, 6]
    assert run.events == [(5, "skipped"), (10, "stop"), (10, "save"), (20, "save")]
    elements = Elements(page([run]))
    data = json.loads(elements.scripts[0])
    loss = data[0]["lines"][0]
    assert (loss["name"], loss["at"][0], loss["at"][-1]) == ("trained on", [1, "10"], [30, "0.3333"])
    assert data[0]["lines"][1]["at"] == [[10, "2"], [20, "1"], [30, "0.6667"]]
    assert {one["name"] for one in data[1]["lines"]} == {"wiki", EVIL}
    charts = [attributes["aria-label"] for tag, attributes in elements.found if tag == "svg"]
    assert charts[:4] == ["loss", "loss by dataset", "learning rate", "gradient norm"]
    assert "MFU" not in charts  # not known: no empty chart
    stops = [a["style"] for _, a in elements.found if a.get("class") == "mark stop"]
    assert stops == ["left:31.03%"] * len(charts)  # step 10 of 1 to 30


def test_a_page_needs_no_network_and_shows_names_as_they_are(tmp_path: Path) -> None:
    html = page([History.read(write(tmp_path / "run", [line(step) for step in range(1, 4)]))])
    elements = Elements(html)
    outside = {"src", "href", "link", "img", "iframe"}
    assert [tag for tag, attributes in elements.found if outside & {tag, *attributes}] == []
    assert html.count("<b>") == 8  # of the tiles, none of a name
    assert not re.search(r"https?:|url\(|@import|fetch\(", html)
    assert len(elements.scripts) == 2


def test_a_long_run_keeps_its_spikes(tmp_path: Path) -> None:
    lines = [line(step, grad_norm=50.0 if step == 777 else 1.0) for step in range(1, 2001)]
    run = History.read(write(tmp_path / "run", lines))
    curve = run.column("grad_norm").curve()
    assert len(curve) <= POINTS
    assert sum(point.high == 50.0 for point in curve) == 1
    assert curve[-1] == Point(2000, 1.0, 1.0, 1.0)
    chart = Chart.of("g", "", [Line("g", 0, curve)], last=2000, log=True)
    assert chart.y.log
    assert min(float(y) for y in re.findall(r" ([\d.]+)", chart.band(chart.lines[0]))) == 4.55  # the spike, at the top


def test_a_path_is_the_values() -> None:
    points = [Point(1, 4.0, 4.0, 4.0), Point(5, 2.0, 2.0, 2.0), Point(9, 3.0, 3.0, 3.0)]
    chart = Chart.of("t", "", [Line("a", 0, points)], last=9, zero=True)
    assert chart.path(chart.lines[0]) == "M0.00 4.76L50.00 52.38L100.00 28.57"  # of 0 to 4.2
    assert chart.band(chart.lines[0]) == ""
    assert [label for _, label in chart.y.ticks()] == ["0", "1", "2", "3", "4"]
    assert Axis(0.02, 30.0, log=True).ticks()[0] == (9.59, "0.03")
    assert [text(value) for value in (0, 2e-5, 0.125, 12.3456, 64110.2, 2.5e7)] == [
        "0",
        "2e-05",
        "0.125",
        "12.35",
        "64,110",
        "25M",
    ]


def test_several_runs_lie_over_one_another(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / name / "run", [line(s, loss=k / s) for s in range(1, k)]) for name, k in (("a", 9), ("b", 7))
    ]
    runs = [History.read(path) for path in paths]
    runs[1].config["lr"] = 3e-4
    elements = Elements(page(runs))
    data = json.loads(elements.scripts[0])
    assert [(one["name"], len(one["at"])) for one in data[0]["lines"]] == [("a/run", 8), ("b/run", 6)]
    titles = [attributes["aria-label"] for tag, attributes in elements.found if tag == "svg"]
    assert titles[1:3] == [f"loss of {EVIL}", "loss of wiki"]
    html = page(runs)
    assert "0.0003" in html.split("Where their configs differ")[1].split("</table>")[0]


def test_the_command_says_what_it_needs(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [line(1)])

    def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "trainer", "report", *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)

    done = command(run)
    assert (done.returncode, done.stdout) == (0, f"{run}/report.html\n")
    assert "<svg" in Path(run, "report.html").read_text()
    done = command(run, run)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--out FILE.html" in done.stderr
    done = command(str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has no metrics.jsonl" in done.stderr


def test_a_run_draws_itself_when_it_publishes(tmp_path: Path) -> None:
    with Metrics(Folder(str(tmp_path)), 0, 50, config={"seed": 7}) as metrics:
        metrics.publish()
        assert not (tmp_path / "report.html").exists()  # no step yet
        metrics.report(StepMetrics(**line(1), trained_tokens=10))
        metrics.publish()
        assert "1 of 50" in (tmp_path / "report.html").read_text()
        metrics.report(StepMetrics(**line(2), trained_tokens=10))
    assert "2 of 50" in (tmp_path / "report.html").read_text()
