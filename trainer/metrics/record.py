"""What people see of a run: one live line, OUTPUT/metrics.jsonl (a JSON object a step), and trackers."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.metrics.appended import AppendedFile
from trainer.metrics.trackers import TensorBoard, Tracker, scalars_of, services
from trainer.report.history import METRICS, History
from trainer.report.page import PAGE, page

ASIDE = "metrics.aside.jsonl"
_LINE_EVERY = 10.0  # seconds, where the output is not a terminal, as kanyun.cli.progress has it


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one step, over all ranks."""

    step: int
    loss: float  # mean over the trained tokens of the global batch
    lr: float
    grad_norm: float  # before clipping; not finite: the step was skipped
    skipped: int  # steps so far
    trained_tokens: int
    tokens_per_second: float  # useful token slots: all but padding
    mfu: float | None  # share of the GPUs' peak; None where that is not known
    data_wait: float  # share of the time that the model waited for data, on the rank that waited longest
    data_wait_mean: float  # the same over the ranks
    # Data-parallel rank that worked longest by itself: reading data, forward and backward passes. All wait for it.
    slowest_rank: int
    work_seconds: float  # of that rank
    work_seconds_mean: float  # over the ranks
    imbalance: float  # cost of the packs of the rank that has most, over the ranks' mean; 1 = all equal
    seconds: float
    memory_gb: float  # peak of rank 0's device; on a CPU, of its process
    validation_loss: float | None
    # Means over their trained tokens; what has no separate name is "(other)".
    loss_by_dataset: dict[str, float] = field(default_factory=dict)
    tokens_by_dataset: dict[str, int] = field(default_factory=dict)  # trained ones
    validation_loss_by_dataset: dict[str, float] = field(default_factory=dict)
    # start: a process's first step; save: a checkpoint is begun; save failed: the one before; stop: told to
    events: list[str] = field(default_factory=list)
    steps: int | None = None  # of the whole run


class Metrics:
    """Writes what rank 0 reports. A context manager.

    A run that resumes at step `start` appends to its metrics.jsonl. Lines of later steps, which are done again, and
    damaged lines are moved to metrics.aside.jsonl; `notes` says so. A full disk ends no run here: saves decide that.
    For an output that is no local disk, files are written to a temporary folder and copied by `publish`, which also
    draws report.html.
    """

    def __init__(
        self,
        output: Folder,
        start: int,
        steps: int,
        *,
        ranks: int = 1,
        config: dict[str, Any] | None = None,
        owns: Callable[[], bool] | None = None,
    ) -> None:
        """`ranks`: data-parallel ones. `config`: what trackers show of the run besides its numbers. `owns`: whether the
        output is still this run's.
        """
        self._steps, self._output, self._ranks, self._config = steps, output, ranks, config or {}
        self._owns = owns or (lambda: True)
        self.notes = _set_aside(output, start)
        self._open = ExitStack()
        self._local = Path(output.path)
        if not output.is_local:
            self._local = Path(self._open.enter_context(TemporaryDirectory(prefix="kanyun-metrics-")))
            self._local.joinpath(METRICS).write_bytes(output.read(METRICS) if output.exists(METRICS) else b"")
        file_owns = self._owns if output.is_local else lambda: True
        self._lines = AppendedFile(self._local / METRICS, file_owns)
        self._refused = ""  # why the disk takes no lines, as last said
        self._unpublished = ""  # why the output took no files, as last said
        self._terminal = sys.stdout.isatty()
        board = TensorBoard(self._local, start, self._say, file_owns)
        self._trackers: list[Tracker] = [board, *services(output.uri, self._config, self._say)]
        for tracker in self._trackers:
            self._open.callback(tracker.close)
        self._shown = 0.0
        self._drawn, self._drawing = 0.0, 0.0  # when report.html was begun last, and what it took, seconds
        self._seconds: float | None = None  # of a step, smoothed: for the ETA
        self._unsaved = ""  # on the live line while saves fail

    def report(self, metrics: StepMetrics) -> None:
        line = _finite(asdict(metrics))
        refused = self._lines.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        if refused and refused != self._refused:
            self._say(f"{self._local / METRICS} cannot be written ({refused}): its lines wait in memory until it can")
        self._refused = refused
        for tracker in self._trackers:
            tracker.log(scalars_of(line), metrics.step)
        self._show(metrics)

    def tell_saves(self, failed: str, failures: int, last: str | None) -> None:
        """Print why a checkpoint was not written; as long as saves fail, the live line says which one is the last."""
        self._unsaved = f"save failed, last is {last or 'none'}" if failures else ""
        if failed:
            self._say(failed)

    def publish(self) -> None:
        """Draw the run, if that takes a thousandth of the time or less; copy all to an output that is no local disk.

        A storage that refuses them ends no run: it is said, and tried again at the next save.
        """
        refused = ""
        try:
            if not self._owns():
                return
            if time.monotonic() - self._drawn > 1000 * self._drawing:
                self._draw()
            if not self._output.is_local:
                for file in self._local.rglob("*"):
                    if file.is_file():
                        self._output.write(str(file.relative_to(self._local)), file.read_bytes())
        except (UserError, OSError) as error:
            refused = f"{'report.html' if self._output.is_local else 'metrics'} not written ({error})"
        if refused and refused != self._unpublished:
            self._say(refused)
        self._unpublished = refused

    def close(self) -> None:
        self._drawing = 0.0  # so that the last drawing is not skipped for its cost
        lost = self._lines.close()
        if lost:
            self._say(lost)
        self.publish()
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _draw(self) -> None:
        """Write report.html: 0.4 s for 10,000 steps."""
        if self._seconds is None:  # no step yet
            return
        self._drawn, local = time.monotonic(), Folder(str(self._local))
        history = History.read(local.path)
        history.name, history.config = self._output.path, self._config
        local.write(PAGE, page([history]).encode())
        self._drawing = time.monotonic() - self._drawn

    def _say(self, sentence: str) -> None:
        """Print it on a separate line, below the live one."""
        self._print(("\n" if self._terminal else "") + sentence)

    def _print(self, text: str, end: str = "\n") -> None:
        with suppress(OSError):  # a log may be on the disk that is full
            print(text, end=end, flush=True)

    def _show(self, metrics: StepMetrics) -> None:
        self._seconds = 0.9 * self._seconds + 0.1 * metrics.seconds if self._seconds else metrics.seconds
        last = metrics.step == self._steps
        lasting = last or metrics.validation_loss is not None or not math.isfinite(metrics.grad_norm)
        now = time.monotonic()
        if self._terminal:
            self._print(f"\r\033[K{self._line(metrics)}", end="\n" if lasting else "")
        elif lasting or now - self._shown > _LINE_EVERY:
            self._print(self._line(metrics))
            self._shown = now

    def _line(self, metrics: StepMetrics) -> str:
        left = timedelta(seconds=round((self._steps - metrics.step) * (self._seconds or 0)))
        parts = [
            f"step {metrics.step}/{self._steps}",
            f"loss {metrics.loss:.4f}",
            f"held-out {metrics.validation_loss:.4f}" if metrics.validation_loss is not None else "",
            f"lr {metrics.lr:.2e}",
            f"grad {metrics.grad_norm:.3f}",
            f"{metrics.skipped} skipped" if metrics.skipped else "",
            f"{metrics.tokens_per_second:,.0f} tokens/s",
            f"MFU {metrics.mfu:.1%}" if metrics.mfu is not None else "MFU n/a",
            f"data wait {metrics.data_wait:.0%}",
            *(_ranks(metrics) if self._ranks > 1 else ()),
            f"{metrics.memory_gb:.1f} GB",
            f"ETA {left}",
            self._unsaved,
        ]
        return "  ".join(part for part in parts if part)


def _finite(value: Any) -> Any:
    """Return the value as JSON has it: None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ranks(metrics: StepMetrics) -> list[str]:
    """Return what the live line says of several ranks."""
    return [
        f"(mean {metrics.data_wait_mean:.0%})",
        f"slowest rank {metrics.slowest_rank}: {metrics.work_seconds:.2f} s,"
        f" {metrics.work_seconds / metrics.work_seconds_mean:.2f} x mean",
        f"packs max/mean {metrics.imbalance:.2f}",
    ]


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak of memory used: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts KiB


def _set_aside(output: Folder, start: int) -> str:
    """Keep the lines of steps up to `start` in metrics.jsonl, move the others. Return a sentence, or ""."""
    if not output.exists(METRICS):
        return ""
    content = output.read(METRICS)
    lines = content.splitlines(keepends=True)
    steps = [_step(line) for line in lines]
    kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= start]
    moved = [line for line, step in zip(lines, steps, strict=True) if step is None or step > start]
    if moved:
        before = output.read(ASIDE) if output.exists(ASIDE) else b""
        output.write(ASIDE, before + _joined(moved))
    if moved or not content.endswith(b"\n"):  # a line that is whole but for its end
        output.write(METRICS, _joined(kept))
    if not moved:
        return ""
    damaged = steps.count(None)
    later = len(moved) - damaged
    what = [f"{later} line(s) of steps after {start}"] if later else []
    what += [f"{damaged} damaged line(s)"] if damaged else []
    return f"{' and '.join(what)} moved from {METRICS} to {ASIDE}"


def _joined(lines: Sequence[bytes]) -> bytes:
    return b"".join(line.rstrip(b"\n") + b"\n" for line in lines)


def _step(line: bytes) -> int | None:
    """Return the step of a line of metrics.jsonl; None if it is damaged or was cut short."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None  # True is an int, too
