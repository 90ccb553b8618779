"""What metrics.jsonl says of a run, as curves of few points."""

import json
import math
from array import array
from dataclasses import dataclass
from io import BytesIO
from statistics import fmean
from typing import Any

from kanyun.errors import UserError
from kanyun.storage import Folder

METRICS = "metrics.jsonl"
RUN = "run.json"  # the config of a run
_LOSSES = ("loss_by_dataset", "validation_loss_by_dataset")
POINTS = 300  # of a curve: a chart is 350 to 800 pixels wide


@dataclass(frozen=True)
class Point:
    """Some steps in a row, up to `step`: their mean, smallest and largest value."""

    step: int
    mean: float
    low: float
    high: float


class Column:
    """The steps that have a value, and their values. In arrays 100,000 steps of 100 columns are 160 MB."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: Any) -> None:
        """Add a value if it is a finite number."""
        if isinstance(value, int | float) and math.isfinite(value):
            self.steps.append(step)
            self.values.append(value)

    def curve(self) -> list[Point]:
        """Return at most POINTS points, each of equally many values."""
        size = max(-(-len(self.values) // POINTS), 1)
        return [self._point(slice(start, start + size)) for start in range(0, len(self.values), size)]

    def _point(self, part: slice) -> Point:
        values = self.values[part]
        return Point(self.steps[part][-1], fmean(values), min(values), max(values))


class History:
    """One run. Its metrics.jsonl may end anywhere: the run may still be writing.

    `events`: (step, event), as the lines have them, and `skipped` where the gradient was not finite.
    """

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.name, self.config = name, config
        self.last: dict[str, Any] = {}  # line
        self.datasets: set[str] = set()  # that have a loss
        self.events: list[tuple[int, str]] = []
        self._columns: dict[tuple[str, str | None], Column] = {}

    @classmethod
    def read(cls, path: str) -> "History":
        """Raises UserError if there is no metrics.jsonl, or no whole line in it."""
        folder = Folder(path)
        if not folder.exists(METRICS):
            raise UserError(f"{folder.path} has no {METRICS}: give the output folder of a run that has done a step")
        history = cls(folder.path, _config(folder))
        for text in BytesIO(folder.read(METRICS)):
            if line := _line(text):
                history._add(line)
        if not history.last:
            raise UserError(f"{folder.path}/{METRICS} has no whole line yet: try again after the first step")
        return history

    def column(self, key: str, dataset: str | None = None) -> Column:
        """Return the values of a key; `dataset`: of a key by dataset."""
        return self._columns.get((key, dataset)) or Column()

    def recent(self, key: str) -> float | None:
        """Return the mean over the last twentieth of the steps; None if there is no value."""
        values = self.column(key).values
        return fmean(values[-max(len(values) // 20, 1) :]) if values else None

    def _add(self, line: dict[str, Any]) -> None:
        step, skipped = line["step"], line.get("skipped", 0)
        for key, value in line.items():
            for dataset, number in value.items() if isinstance(value, dict) else ((None, value),):
                self._columns.setdefault((key, dataset), Column()).add(step, number)
            if key in _LOSSES:
                self.datasets |= (value or {}).keys()
        self.events += [(step, event) for event in line.get("events") or []]
        if skipped > self.last.get("skipped", 0):
            self.events.append((step, "skipped"))
        self.last = line


def _config(folder: Folder) -> dict[str, Any]:
    """Return the config of a run. Raises UserError if run.json is there and damaged."""
    try:
        config = json.loads(folder.read(RUN)) if folder.exists(RUN) else {}
        if not isinstance(config, dict):
            raise ValueError("it is no object of names and values")
        return config
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder.path}/{RUN} is damaged ({error}): the run writes it anew; else delete it") from error


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # cut short: it is being written; or damaged
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
