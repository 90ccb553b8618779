"""What people see of a run: one live line, OUTPUT/metrics.jsonl (a JSON object a step), OUTPUT/tensorboard/."""

import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from kanyun.storage import Folder

METRICS = "metrics.jsonl"
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
    data_wait: float  # share of the time that the model waited for data
    imbalance: float  # cost of the packs of the rank that has most, over the ranks' mean; 1 = all alike
    seconds: float
    memory_gb: float  # peak of rank 0's device; on a CPU, of its process
    validation_loss: float | None


class Metrics:
    """Writes what rank 0 reports. A context manager.

    Lines of steps after `start` are dropped: they are of a run that was killed after its last checkpoint.
    """

    def __init__(self, output: Folder, start: int, steps: int):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import: other ranks need not

        self._steps = steps
        kept = [line for line in _lines(output) if line["step"] <= start]
        output.write(METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = Path(output.path, METRICS).open("a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._board = SummaryWriter(str(Path(output.path, "tensorboard")), purge_step=start + 1)
        self._terminal = sys.stdout.isatty()
        self._shown = 0.0
        self._seconds: float | None = None  # of a step, smoothed: for the ETA

    def report(self, metrics: StepMetrics) -> None:
        values = asdict(metrics)
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._file.write(json.dumps({name: finite.get(name) for name in values}) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if name != "step":
                self._board.add_scalar(name, value, metrics.step)
        self._show(metrics)

    def close(self) -> None:
        self._board.close()
        self._file.close()

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
            f"ranks max/mean {metrics.imbalance:.2f}",
            f"{metrics.memory_gb:.1f} GB",
            f"ETA {left}",
        ]
        return "  ".join(part for part in parts if part)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts KiB


def _lines(output: Folder) -> list[dict[str, Any]]:
    """Of an existing metrics.jsonl; a last line that a kill cut short is left out."""
    if not output.exists(METRICS):
        return []
    *whole, _ = output.read(METRICS).decode().split("\n")
    return [json.loads(line) for line in whole]
