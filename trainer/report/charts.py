"""The geometry of line charts, in percent of the plot: the page stretches lines, never letters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report.history import Point

_TICKS = 5  # about as many labels an axis has
_LOG = 5.0  # a positive axis is logarithmic from this ratio of its ends on, where the chart asks for it


@dataclass(frozen=True)
class Line:
    """One curve of one run."""

    name: str
    colour: int
    points: Sequence[Point]
    dots: bool = False  # few values, far apart


@dataclass(frozen=True)
class Mark:
    """An event of a run, at `left` percent."""

    left: float
    kind: str
    title: str


@dataclass(frozen=True)
class Chart:
    """Curves over steps. Ticks are (percent, label), from the left and from the top."""

    title: str
    unit: str
    lines: Sequence[Line]
    marks: Sequence[Mark]
    x: "Axis"
    y: "Axis"

    @classmethod
    def of(
        cls,
        title: str,
        unit: str,
        lines: Sequence[Line],
        events: Sequence[tuple[int, str, str]] = (),
        *,
        last: int,
        log: bool = False,
        zero: bool = False,
    ) -> "Chart":
        """`events`: (step, kind, title); `last`: the last step of all charts; `zero`: the axis begins at 0."""
        points = [point for line in lines for point in line.points]
        x = Axis(1, max(last, 2))
        y = Axis(0.0 if zero else min(p.low for p in points), max(p.high for p in points), log=log)
        marks = [Mark(x.at(step), kind, text) for step, kind, text in events]
        return cls(title, unit, [line for line in lines if line.points], marks, x, y)

    def path(self, line: Line) -> str:
        """Return the curve of means, as an SVG path in a box of 100 x 100."""
        return "M" + "L".join(self._at(p.step, p.mean) for p in line.points)

    def band(self, line: Line) -> str:
        """Return the area from the smallest to the largest values; "" where each point is one value."""
        if all(p.low == p.high for p in line.points):
            return ""
        there = [self._at(p.step, p.high) for p in line.points]
        back = [self._at(p.step, p.low) for p in reversed(line.points)]
        return "M" + "L".join(there + back) + "Z"

    def dots(self, line: Line) -> list[tuple[float, float]]:
        """Return (left, top) of each point, in percent."""
        return [(round(self.x.at(p.step), 2), round(100 - self.y.at(p.mean), 2)) for p in line.points]

    def data(self) -> dict[str, object]:
        """Return what the page shows beside the pointer."""
        return {
            "first": self.x.low,
            "last": self.x.high,
            "lines": [
                {"name": line.name, "colour": line.colour, "at": [[p.step, text(p.mean)] for p in line.points]}
                for line in self.lines
            ],
        }

    def _at(self, step: int, value: float) -> str:
        return f"{self.x.at(step):.2f} {100 - self.y.at(value):.2f}"


class Axis:
    """Maps values from `low` to `high` to 0 .. 100 percent."""

    def __init__(self, low: float, high: float, *, log: bool = False) -> None:
        self.log = log and low > 0 and high / low >= _LOG
        if high == low:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        elif self.log:  # a twentieth on either side: a peak on the border looks cut off
            margin = (high / low) ** 0.05
            low, high = low / margin, high * margin
        elif isinstance(low, float):
            low = low if low == 0 else low - (high - low) / 20
            high += (high - low) / 20
        self.low, self.high = low, high

    def at(self, value: float) -> float:
        scale = math.log if self.log else float
        part = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return 100 * min(max(part, 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """Return (percent, label)."""
        values = _decades(self.low, self.high) if self.log else _round_steps(self.low, self.high)
        return [(round(self.at(value), 2), text(value)) for value in values]


def text(value: float) -> str:
    """Format a number in few characters: 12,000, 3.142, 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.3g}"


def _round_steps(low: float, high: float) -> list[float]:
    rough = (high - low) / _TICKS
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(values) <= _TICKS + 2:
            break
    return values or [low, high]
