"""What people see of a run: one live line, OUTPUT/metrics.jsonl (a JSON object per step), OUTPUT/tensorboard/."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from kanyun.storage import Folder
from trainer.runtime import Runtime

METRICS = "metrics.jsonl"
ASIDE = "metrics.aside.jsonl"
_LINE_EVERY = 5.0  # seconds, where the output is not a terminal


@dataclass(frozen=True)
class StepMetrics:
    """Of one step, over all ranks."""

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


@dataclass(frozen=True)
class RankTimes:
    """Seconds of a step on each data-parallel rank."""

    work: Sequence[float]  # by itself, up to where the ranks' gradients meet
    waited: Sequence[float]  # of them, for data

    @classmethod
    def of(cls, slots: Sequence[float]) -> Self:
        """Return what the ranks' `WorkClock.slots` are together."""
        ranks = len(slots) // 2
        return cls(slots[:ranks], slots[ranks:])

    def figures(self, seconds: float) -> dict[str, Any]:
        """Return what StepMetrics has of them, of a step that took `seconds`."""
        slowest = max(range(len(self.work)), key=self.work.__getitem__)
        return {
            "data_wait": max(self.waited) / seconds,
            "data_wait_mean": fmean(self.waited) / seconds,
            "slowest_rank": slowest,
            "work_seconds": self.work[slowest],
            "work_seconds_mean": fmean(self.work),
        }


class WorkClock:
    """Takes the time that this rank works on a step by itself. On a GPU by events, so that the host need not wait.

    `waited` returns the seconds that the model has waited for data so far.
    """

    def __init__(self, waited: Callable[[], float], cuda: bool) -> None:
        self._waited, self._cuda, self._running = waited, cuda, False
        self._before = self._begin = self._end = 0.0
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def start(self) -> None:
        """Begin a step. Does nothing within one."""
        if not self._running:
            self._running, self._before, self._begin = True, self._waited(), time.perf_counter()
            self._events[0].record()

    def stop(self) -> None:
        """End the step's own work: the last backward pass has been given to the device."""
        self._running, self._end = False, time.perf_counter()
        self._events[1].record()

    def slots(self, runtime: Runtime) -> Tensor:
        """Return [2 x ranks] seconds, 0 but for this rank's work and its wait for data. Waits for the device."""
        work = self._end - self._begin
        if self._cuda:
            self._events[1].synchronize()
            work = self._events[0].elapsed_time(self._events[1]) / 1e3
        slots = torch.zeros(2, runtime.data_world)
        slots[:, runtime.data_rank] = torch.tensor([work, self._waited() - self._before])
        return slots.flatten().to(runtime.device)


class Metrics:
    """Writes what rank 0 reports. A context manager.

    A run that resumes at step `start` appends to its metrics.jsonl. Lines of later steps, which are done again, and
    damaged lines are moved to metrics.aside.jsonl; `notes` says so. For an output that is no local disk, files are
    written to a temporary folder and copied by `publish`.
    """

    def __init__(self, output: Folder, start: int, steps: int, ranks: int = 1):
        """`ranks`: data-parallel ones."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import: other ranks need not

        self._steps, self._output, self._ranks = steps, output, ranks
        self.notes = _set_aside(output, start)
        self._open = ExitStack()
        self._local = Path(output.path)
        if not output.is_local:
            self._local = Path(self._open.enter_context(TemporaryDirectory(prefix="kanyun-metrics-")))
            self._local.joinpath(METRICS).write_bytes(output.read(METRICS) if output.exists(METRICS) else b"")
        self._file = self._open.enter_context(self._local.joinpath(METRICS).open("a", encoding="utf-8"))
        self._board = SummaryWriter(str(self._local / "tensorboard"), purge_step=start + 1)
        self._open.callback(self._board.close)
        self._terminal = sys.stdout.isatty()
        self._shown = 0.0
        self._seconds: float | None = None  # of a step, smoothed: for the ETA
        self._unsaved = ""  # on the live line while saves fail

    def report(self, metrics: StepMetrics) -> None:
        values = asdict(metrics)
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._file.write(json.dumps({name: finite.get(name) for name in values}) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if name != "step":
                self._board.add_scalar(name, value, metrics.step)
        self._show(metrics)

    def tell_failed_save(self, sentence: str, last: str | None) -> None:
        """Print why a checkpoint was not written, and keep saying on the live line which one is the last."""
        self._unsaved = f"save failed, last is {last or 'none'}"
        print(("\n" if self._terminal else "") + sentence, flush=True)

    def tell_saved(self) -> None:
        self._unsaved = ""

    def publish(self) -> None:
        """Copy the files to an output that is no local disk."""
        if not self._output.is_local:
            self._board.flush()
            for file in self._local.rglob("*"):
                if file.is_file():
                    self._output.write(str(file.relative_to(self._local)), file.read_bytes())

    def close(self) -> None:
        self._file.flush()
        self.publish()
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, metrics: StepMetrics) -> None:
        self._seconds = 0.9 * self._seconds + 0.1 * metrics.seconds if self._seconds else metrics.seconds
        last = metrics.step == self._steps
        lasting = last or metrics.validation_loss is not None or not math.isfinite(metrics.grad_norm)
        now = time.monotonic()
        if self._terminal:
            print(f"\r\033[K{self._line(metrics)}", end="\n" if lasting else "", flush=True)
        elif lasting or now - self._shown > _LINE_EVERY:
            print(self._line(metrics), flush=True)
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
    lines = output.read(METRICS).splitlines(keepends=True)
    steps = [_step(line) for line in lines]
    kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= start]
    moved = [line for line, step in zip(lines, steps, strict=True) if step is None or step > start]
    if not moved:
        return ""
    before = output.read(ASIDE) if output.exists(ASIDE) else b""
    output.write(ASIDE, before + b"".join(line.rstrip(b"\n") + b"\n" for line in moved))
    output.write(METRICS, b"".join(kept))
    damaged = steps.count(None)
    later = len(moved) - damaged
    what = [f"{later} line(s) of steps after {start}"] if later else []
    what += [f"{damaged} damaged line(s)"] if damaged else []
    return f"{' and '.join(what)} moved from {METRICS} to {ASIDE}"


def _step(line: bytes) -> int | None:
    """Return the step of a line of metrics.jsonl; None if it is damaged or was cut short."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None
