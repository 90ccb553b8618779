"""What metrics.jsonl says of a run, as curves of few points."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from kanyun.errors import UserError
from kanyun.storage import Folder

METRICS = "metrics.jsonl"
RUN = "run.json"  # the config of a run
POINTS = 300  # of a curve: a chart is 350 to 800 pixels wide


@dataclass(frozen=True)
class Point:
    """Some steps in a row, up to `step`: their mean, smallest and largest value."""

    step: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class History:
    """One run. Its lines may end anywhere: it may still be writing."""

    name: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]

    @classmethod
    def read(cls, path: str) -> "History":
        """Raises UserError if there is no metrics.jsonl, or no whole line in it."""
        folder = Folder(path)
        if not folder.exists(METRICS):
            raise UserError(f"{folder.path} has no {METRICS}: give the output folder of a run that has done a step")
        lines = [line for text in folder.read(METRICS).splitlines() if (line := _line(text))]
        if not lines:
            raise UserError(f"{folder.path}/{METRICS} has no whole line yet: try again after the first step")
        config = json.loads(folder.read(RUN)) if folder.exists(RUN) else {}
        return cls(folder.path, config, sorted(lines, key=lambda line: line["step"]))

    @property
    def last(self) -> dict[str, Any]:
        return self.lines[-1]

    @cached_property
    def datasets(self) -> list[str]:
        """Names of the datasets with a loss, sorted."""
        keys = ("loss_by_dataset", "validation_loss_by_dataset")
        return sorted({name for line in self.lines for key in keys for name in line.get(key) or {}})

    def values(self, key: str, dataset: str | None = None) -> list[tuple[int, float]]:
        """Return (step, value) of the steps that have one; `dataset`: of a value by dataset."""
        found = []
        for line in self.lines:
            value = line.get(key)
            if dataset is not None:
                value = (value or {}).get(dataset)
            if isinstance(value, int | float) and math.isfinite(value):
                found.append((line["step"], value))
        return found

    def curve(self, key: str, dataset: str | None = None) -> list[Point]:
        """Return at most POINTS points, each of equally many values."""
        values = self.values(key, dataset)
        size = -(-len(values) // POINTS)
        return [_point(values[start : start + size]) for start in range(0, len(values), size or 1)]

    def events(self) -> list[tuple[int, str]]:
        """Return (step, event), as the lines have them, and `skipped` where the gradient was not finite."""
        found, skipped = [], 0
        for line in self.lines:
            found += [(line["step"], event) for event in line.get("events") or []]
            if line.get("skipped", 0) > skipped:
                found.append((line["step"], "skipped"))
            skipped = line.get("skipped", 0)
        return found

    def recent(self, key: str) -> float | None:
        """Return the mean over the last twentieth of the steps; None if there is no value."""
        values = [value for _, value in self.values(key)]
        return fmean(values[-max(len(values) // 20, 1) :]) if values else None


def _point(values: Sequence[tuple[int, float]]) -> Point:
    numbers = [value for _, value in values]
    return Point(values[-1][0], fmean(numbers), min(numbers), max(numbers))


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:  # cut short: it is being written
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
