"""Reports as HTML pages: the templates of templates/, and the geometry of charts. One file each, no network."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from pipeline.reports.report import Histogram

_LINEAR = 16  # up to this value an axis has every whole number


def render(template: str, **values: Any) -> str:
    """Return a template of templates/ as HTML; values are escaped."""
    return _environment().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "short": short, "duration": duration, "share": share}
    environment.globals |= {"chart": Chart.of}
    return environment


def number(value: Any) -> str:
    """Format a number as 1,234,567 or 0.99731; other values as they are."""
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def short(value: float) -> str:
    """Format a number in at most five characters: 950, 1,024, 65k, 1.5M."""
    if value < 10_000:
        return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value < 999.5 * size else f"{value / size:.0f}{letter}"
    return str(value)


def duration(seconds: float) -> str:
    """Format seconds as 4.1 s, 3 min 20 s or 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def share(part: float, whole: float) -> str:
    """Format a part in percent, which is rounded neither to 0 nor to 100."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.01:
        return "< 0.01 %"
    if 99.99 < percent < 100:
        return "> 99.99 %"
    return f"{percent:.2f}".rstrip("0").rstrip(".") + " %"


@dataclass(frozen=True)
class Bar:
    """A bar, in percent of the chart."""

    left: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Chart:
    """A histogram as bars. The axis is linear for small values, else logarithmic, where 0 has a separate place."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]  # percent from the left, label
    median: float  # percent from the left

    @classmethod
    def of(cls, histogram: "Histogram") -> "Chart":
        edges = {number: histogram.edges(number) for number in histogram.bins}
        least = min((first for first, _ in edges.values() if first), default=1)
        axis = _Axis(0 in histogram.bins, least, histogram.most)
        highest = max(histogram.bins.values())
        bars = []
        for number, count in sorted(histogram.bins.items()):
            first, end = edges[number]
            left, right = axis.at(first), axis.at(end)
            values = f"{first:,}" if end == first + 1 else f"{first:,} – {end - 1:,}"
            # A single row among millions stays visible.
            bars.append(Bar(left, right - left, max(100 * count / highest, 1), f"{values}: {count:,}"))
        median = histogram.quantile(0.5)
        return cls(bars, axis.ticks(), (axis.at(median) + axis.at(median + 1)) / 2)


class _Axis:
    """Maps values to percent from the left. A value takes the space up to the next."""

    def __init__(self, zero: bool, least: int, most: int):
        self._least, self._most, self._zero = least, max(most, least), zero
        self._linear = most <= _LINEAR
        if self._linear and zero:
            self._least = 0
        self._room = 7.0 if zero and not self._linear else 0.0  # of the value 0 on a logarithmic axis
        self._low, self._high = self._scale(self._least), self._scale(self._most + 1)
        if not self._linear:  # up to the edges of the outermost bins
            self._low, self._high = math.floor(self._low * 8) / 8, math.ceil(self._high * 8) / 8

    def at(self, value: float) -> float:
        if self._room and value < 1:
            return 0.0
        if self._room and value == 1 and self._least > 1:
            return self._room - 1.5  # the end of the bar of 0
        part = (self._scale(value) - self._low) / (self._high - self._low)
        return self._room + (100 - self._room) * min(max(part, 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        if self._linear:
            step = 1 if self._most - self._least <= 8 else 4
            values = [v for v in range(self._least, self._most + 1) if v % step == 0]
            return [((self.at(v) + self.at(v + 1)) / 2, short(v)) for v in values]
        decades = range(math.floor(self._low * math.log10(2)), math.ceil(self._high * math.log10(2)) + 1)
        for mantissas in ((1, 2, 5), (1, 3), (1,)):
            values = [m * 10**d for d in decades if d >= 0 for m in mantissas]
            values = [v for v in values if self._low <= self._scale(v) <= self._high]
            if len(values) <= 6:
                break
        if len(values) < 2:
            values = [self._least, self._most]
        zero = [(self._room / 2 - 0.75, "0")] if self._room else []
        return zero + [(self.at(v), short(v)) for v in values]

    def _scale(self, value: float) -> float:
        return value if self._linear else math.log2(max(value, 1))
