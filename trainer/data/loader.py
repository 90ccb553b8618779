"""Reads and decodes packs ahead of the model, in order, in threads.

Threads, because reading (Rust), decoding (Pillow) and resizing (torch) release the GIL; forks would break hdfs-native's
threads and could not fill page-locked memory.
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

# Bytes of prefetched micro-batches: 90 packs of 18,816 patches.
_AHEAD_BYTES = 1 << 30
# Bytes of cached record batches, which one shuffle window reads several times: 16 steps of 64 packs take 2.6 GB of
# images and text, 0.5 GB of text alone. What does not fit is read once more, at most once a pack.
_HELD_BYTES = 2 << 30
_TOKEN_BYTES = 8 + 8 + 4 + 3 * 8 + 1  # of a token slot in a Batch


class Pick(NamedTuple):
    """A pack whose record batch is being read."""

    batch: "Future[list[Pack]]"
    row: int
    blank: bool = False  # fills up a micro-batch: no token is trained

    def pack(self) -> Pack:
        pack = self.batch.result()[self.row]
        return replace(pack, loss_mask=np.zeros_like(pack.loss_mask)) if self.blank else pack


class Loader:
    """A pool of threads and a cache of record batches, both bounded in bytes.

    A task waits only for tasks queued before it (a micro-batch for its reads), so one thread is enough.
    """

    def __init__(self, batch_format: BatchFormat, micro_batch: int, length: int, vision_budget: int):
        pixels = batch_format.geometry.pixels if batch_format.geometry else 0
        size = micro_batch * (length * _TOKEN_BYTES + vision_budget * pixels)
        threads = _threads()
        self._ahead = max(2, min(2 * threads, _AHEAD_BYTES // size))  # micro-batches
        self._batch_format = batch_format
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
        self._held: dict[tuple[Packs, int], Future[list[Pack]]] = {}  # least recently used first
        self._held_bytes = 0
        self.wait_seconds = 0.0  # data wait: time in which callers of `run` were blocked

    def keep(self, packs: Packs, batches: Iterable[int]) -> None:
        """Drop all cached record batches but these."""
        for key in self._held.keys() - {(packs, number) for number in batches}:
            self._drop(*key)

    def pick(self, packs: Packs, batch: int, row: int, blank: bool = False) -> Pick:
        """Start to read a record batch, unless it is cached; older ones make room for it."""
        held = self._held.pop((packs, batch), None)
        if held is None:
            self._held_bytes += packs.batch_bytes(batch)
            while self._held and self._held_bytes > _HELD_BYTES:
                self._drop(*next(iter(self._held)))
            held = self._pool.submit(packs.read_batch, batch)
        self._held[packs, batch] = held  # now the most recently used
        return Pick(held, row, blank)

    def _drop(self, packs: Packs, batch: int) -> None:
        del self._held[packs, batch]
        self._held_bytes -= packs.batch_bytes(batch)

    def run(self, micro_batches: Iterator[Sequence[Pick]]) -> Iterator[Batch]:
        """Yield a Batch for each of `micro_batches`, in order; a bounded number of them is prefetched.

        Raises what the task of a batch raised.
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
        """Stop the threads, after the tasks that have begun."""
        self._pool.shutdown(cancel_futures=True)

    def _make(self, picks: Sequence[Pick]) -> Batch:
        return make_batch([pick.pack() for pick in picks], self._batch_format)


def _threads() -> int:
    """Return this process' share of the machine's cores, less one for the model; torchrun sets the number of shares."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(cores - 1, 1), 16)
