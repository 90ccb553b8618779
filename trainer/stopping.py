"""How a run ends before its last step: told to stop, no finite numbers, or a rank that hangs.

A rank that waits in a collective cannot know for whom. So each has a thread that writes its count of phases begun, and
a beat, to the job's store. A rank whose own count stands still for `hang_after` seconds reads those of the others: all
wait for whoever no longer beats, else for whoever has the lowest count. It says so, with the collective that it waits
in itself, and ends some 10 s later; torchrun then ends the others, within 30 s. Where nothing is watched, at the start
and in a save, a collective's own time-out ends the run, without a name: 30 minutes, or twice `hang_after` if that is
longer; 6 hours in a save.
"""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d

from kanyun.errors import UserError

PREEMPTED = 85  # exit code: stopped early and saved; the same command goes on
HUNG = 86  # exit code: a rank made no progress
BAD_STEPS = 5  # gradients in a row that are not finite end the run


class StopSignals:
    """Whether SIGTERM or SIGUSR1 came. The handlers stay for the life of the process: torchrun sends a SIGTERM to ranks
    that are still closing when another one has ended.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def __call__(self) -> bool:
        return self.received is not None

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        self.received = signal.Signals(number).name


class FiniteGuard:
    """Ends a run whose numbers are no longer finite. Every rank has the same ones, so all end together."""

    def __init__(self, weights: Callable[[], Iterable[tuple[str, Tensor]]], lr: float) -> None:
        """`weights`: this rank's, with names."""
        self._weights, self._lr = weights, lr
        self._in_a_row = 0

    def check_gradient(self, norm: float, step: int) -> bool:
        """Return whether the step was skipped. Raises UserError after BAD_STEPS in a row."""
        bad = not math.isfinite(norm)
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if self._in_a_row == BAD_STEPS:
            self._end(f"the gradient was {norm} in {BAD_STEPS} steps in a row, up to step {step}", step)
        return bad

    def check_weights(self, step: int) -> None:
        """Raises UserError if one is not finite, before a checkpoint of them takes the place of the last good one."""
        self._require_finite(step, f"the gradient of step {step} was not finite")

    def check_losses(self, loss: float, held_out: float | None, step: int) -> None:
        """Raises UserError if those of the last step are no numbers: such a run has not succeeded."""
        for name, value in {"loss": loss, "held-out loss": held_out}.items():
            if value is not None and not math.isfinite(value):
                self._end(f"the {name} of the last step, {step}, is {value}", step)

    def _end(self, problem: str, step: int) -> None:
        self._require_finite(step, problem)
        raise UserError(
            f"{problem}, with finite weights: lower lr {self._lr}, or look at the data; the same command goes on from "
            "the last checkpoint"
        )

    def _require_finite(self, step: int, problem: str) -> None:
        from trainer.checkpoint.reader import require_finite  # here, because the launcher needs no megatron

        way_out = f"{problem}; resume from a checkpoint before that"
        require_finite(self._weights(), f"the model at step {step}", way_out)


class Watch:
    """Watches this rank's progress. Without other ranks it does nothing."""

    def __init__(self, rank: int, world_size: int, hang_after: float) -> None:
        self._rank, self._world_size, self._hang_after = rank, world_size, hang_after
        self._count, self._phase, self._since = 0, "", time.monotonic()
        self._beats, self._interval = 0, min(2.0, hang_after / 10)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if world_size > 1:
            # A separate connection: the process group's is locked while the main thread waits in it.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
            job = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"watch {job}", store)
            self._tell()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def begin(self, phase: str) -> None:
        """Say what this rank does from now on. An empty phase is not watched: it may take any time."""
        self._count, self._phase, self._since = self._count + 1, phase, time.monotonic()

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            try:
                self._tell()
                if self._phase and time.monotonic() - self._since > self._hang_after:
                    self._end()
            except dist.DistError:
                return  # the store is gone: the job is at its end

    def _tell(self) -> None:
        self._beats += 1
        place = f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()})"
        self._store.set(str(self._rank), json.dumps([self._count, place, self._phase, self._beats]))

    def _read(self) -> list[tuple[int, str, str, int]]:
        return [json.loads(value) for value in self._store.multi_get([str(rank) for rank in range(self._world_size)])]

    def _end(self) -> None:
        """Name who is behind, and end this process: its main thread waits where nothing interrupts it."""
        before = self._read()
        for _ in range(3):
            time.sleep(self._interval)
            self._tell()
        ranks = self._read()
        silent = [
            f"{now[1]}, which gives no sign" for now, then in zip(ranks, before, strict=True) if now[3] == then[3]
        ]
        lowest = min(count for count, *_ in ranks)
        behind = silent or [f"{place}, in {phase}" for count, place, phase, _ in ranks if count == lowest]
        if len(behind) == self._world_size:
            who = f"all {self._world_size} ranks wait in {self._phase}: see to GPUs and network"
        else:
            who = f"waited for {'; '.join(behind[:4])}{' ...' if len(behind) > 4 else ''}"
        waits_in = f"; rank {self._rank} is in {collective}" if (collective := pending_collective()) else ""
        sentence = f"no progress for {self._hang_after:.0f} s (hang_after): {who}{waits_in}"
        if self._store.add("said", 1) == 1:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        report_failure(sentence)
        os._exit(HUNG)


def pending_collective() -> str:
    """Return the first collective of this rank that has not ended, by torch's flight recorder; "" if there is none."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # NCCL's and gloo's
        record = getattr(_distributed_c10d, name)(includeCollectives=True, onlyActive=True)
        for entry in json.loads(record).get("entries", []):
            if not entry["retired"]:
                return f"{entry['profiling_name']}, collective {entry['collective_seq_id']} of its group"
    return ""


def report_failure(sentence: str) -> None:
    """Tell torchrun, if this is one of its processes, what its closing report shall say of this one."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": sentence, "extraInfo": extra}}, file)
