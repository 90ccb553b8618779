"""How far a command is, on stderr: one line drawn anew on a terminal, a line every 10 seconds in a log."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from types import TracebackType
from typing import Self, TextIO

_LINE_EVERY = 10.0  # seconds, where stderr is no terminal: a job of a day has 8,640 lines
_DRAW_EVERY = 0.5


class Progress:
    """Says every few seconds how much is done, how fast, and when it ends. A context manager, for one thread or many.

    `unit` is a word in the plural, or "B" for bytes. `done` and `total` may be set from outside where a total grows.
    A command that ends within the first interval says nothing.
    """

    def __init__(self, title: str, total: int, unit: str, *, every: float | None = None, out: TextIO | None = None):
        self.done, self.total = 0, total
        self._title, self._unit, self._out = title, unit, out or sys.stderr
        self._terminal = self._out.isatty()
        self._every = every or (_DRAW_EVERY if self._terminal else _LINE_EVERY)
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"progress of {title}", daemon=True)

    def advance(self, count: int = 1) -> None:
        with self._lock:
            self.done += count

    def update(self) -> None:
        """Called before each line; for subclasses that look elsewhere how far they are."""

    def line(self, seconds: float) -> str:
        """Return the line after `seconds` of work."""
        if not self.total:
            return f"{self._title}: {timedelta(seconds=int(seconds))} so far"
        rate = self.done / seconds if seconds else 0.0
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else "unknown"
        amount = f"{self._amount(self.done)} of {self._amount(self.total)}"
        words = "" if self._unit == "B" else f" {self._unit}"
        speed = f"{self._amount(rate)}{words}/s" if rate >= 1 else f"{self._amount(60 * rate)}{words}/min"
        return f"{self._title}: {self.done / self.total:.0%}, {amount}{words}, {speed}, ETA {left}"

    def _amount(self, value: float) -> str:
        if self._unit == "B":
            return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            self.update()
            line = self.line(time.monotonic() - self._start)
            print(f"\r\033[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=self._out)
            self._out.flush()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._terminal:
            print("\r\033[K", end="", file=self._out, flush=True)


def track[Item](items: Iterable[Item], title: str, unit: str) -> Iterator[Item]:
    """Yield the items, with the progress over them."""
    with Progress(title, len(items) if isinstance(items, Sized) else 0, unit) as progress:
        for item in items:
            yield item
            progress.advance()
