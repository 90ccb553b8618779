"""What one step came to: its losses, and the time of each rank."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor

from trainer.metrics.by_dataset import Losses
from trainer.runtime import Runtime


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
        slots = torch.zeros(2, runtime.dp_size)
        slots[:, runtime.dp_rank] = torch.tensor([work, self._waited() - self._before])
        return slots.flatten().to(runtime.device)


@dataclass(frozen=True)
class StepResult:
    """What one step made of its global batch."""

    losses: Losses
    flops: float
    grad_norm: float  # before clipping; not finite: the weights are unchanged
    ranks: RankTimes
    stop: bool = False  # some rank was told to stop

    @property
    def loss(self) -> float:
        """Mean over the step's trained tokens."""
        return self.losses.mean


def process_age() -> float:
    """Return the seconds since this process was started, also where the clock was set since."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # the name may have spaces
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
