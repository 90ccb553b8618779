"""Packs read and decoded ahead of the model, in order, by threads.

Threads, because reading (Rust), decoding (Pillow) and resizing (torch) release the GIL; forks would break hdfs-native's
own threads and could not fill page-locked memory.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kanyun.schema import Pack
from trainer.data.batch import Batch, BatchFormat, make_batch
from trainer.data.source import Packs

# Micro-batches that are ready and not asked for yet may take this much: 90 packs of 18,816 patches.
_AHEAD_BYTES = 1 << 30
# Record batches that a window of the order comes back to: 16 steps of 64 packs of images and text name 2.6 GB of them,
# of text alone 0.5 GB. What does not fit is read again, at most once a pack.
_HELD_BYTES = 2 << 30
_TOKEN_BYTES = 8 + 8 + 4 + 3 * 8  # of a token slot in a Batch


class Pick(NamedTuple):
    """A pack whose record batch is being read."""

    batch: "Future[list[Pack]]"
    row: int
    blank: bool = False  # its loss does not count

    def pack(self) -> Pack:
        pack = self.batch.result()[self.row]
        return replace(pack, loss_mask=np.zeros_like(pack.loss_mask)) if self.blank else pack


class Loader:
    """A pool of threads, and the record batches that are held in memory, both bounded in bytes.

    A task waits only for tasks queued before it (a micro-batch for its reads), so any number of threads will do.
    """

    def __init__(self, form: BatchFormat, micro_batch: int, length: int, vision_budget: int):
        pixels = form.geometry.pixels if form.geometry else 0
        size = micro_batch * (length * _TOKEN_BYTES + vision_budget * pixels)
        threads = _threads()
        self._ahead = max(2, min(2 * threads, _AHEAD_BYTES // size))  # micro-batches
        self._form = form
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
        self._held: dict[tuple[Packs, int], Future[list[Pack]]] = {}  # used longest ago first
        self._held_bytes = 0
        self.wait_seconds = 0.0  # that callers of `run` were kept waiting

    def keep(self, packs: Packs, batches: Iterable[int]) -> None:
        """Forget all record batches but these."""
        for key in self._held.keys() - {(packs, number) for number in batches}:
            self._forget(*key)

    def pick(self, packs: Packs, batch: int, row: int, blank: bool = False) -> Pick:
        """Start to read a record batch, unless it is held already; others make room for it."""
        held = self._held.pop((packs, batch), None)
        if held is None:
            self._held_bytes += packs.batch_bytes(batch)
            while self._held and self._held_bytes > _HELD_BYTES:
                self._forget(*next(iter(self._held)))
            held = self._pool.submit(packs.read_batch, batch)
        self._held[packs, batch] = held  # the last one now
        return Pick(held, row, blank)

    def _forget(self, packs: Packs, batch: int) -> None:
        del self._held[packs, batch]
        self._held_bytes -= packs.batch_bytes(batch)

    def run(self, micro_batches: Iterator[Sequence[Pick]]) -> Iterator[Batch]:
        """A Batch of each of `micro_batches`, in order; a bounded number of them is being made ahead.

        What a task raised is raised here, in place of its batch.
        """
        ready: deque[Future[Batch]] = deque()
        try:
            while True:
                while len(ready) <= self._ahead and (picks := next(micro_batches, None)):
                    ready.append(self._pool.submit(self._make, picks))
                if not ready:
                    return
                start = time.perf_counter()
                batch = ready.popleft().result()
                self.wait_seconds += time.perf_counter() - start
                yield batch
        finally:
            for future in ready:
                future.cancel()

    def close(self) -> None:
        """Stop; tasks that have begun are waited for."""
        self._pool.shutdown(cancel_futures=True)

    def _make(self, picks: Sequence[Pick]) -> Batch:
        return make_batch([pick.pack() for pick in picks], self._form)


def _threads() -> int:
    """This process' share of the machine's cores, one left for the model; torchrun says how many share it."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(cores - 1, 1), 16)
