"""The order of training: which pack is number `index` of an epoch, a pure function of (digest, seed, epoch, index).

An epoch's record batches are shuffled and laid end to end; this line of packs is cut into `global_batch` equal runs,
and slot s of every step takes the next pack of run s. So each record batch is read once, by the one rank that has its
slot; any number of ranks that divides the global batch gives the same global batches; and the number of consumed packs
is all that a resumed run needs. Packs left over by the cut (fewer than a global batch) are not used in this epoch.

Within a window of steps each run is walked by falling cost, so that the packs of one step cost about the same, and the
window's steps are then shuffled. Packs inside a record batch were shuffled by the packing job.
"""

from functools import cached_property

import numpy as np
import xxhash

# Steps whose packs may change places. A larger window makes steps more even, and keeps more record batches in memory.
WINDOW = 16


class Order:
    """Order of one epoch over `sum(packs_per_batch)` packs.

    costs: [packs] any unit, in stored order; None leaves the packs of a run as they are.
    """

    def __init__(
        self,
        packs_per_batch: np.ndarray,  # [batches]
        global_batch: int,  # packs a step
        digest: str,
        seed: int,
        epoch: int,
        costs: np.ndarray | None = None,
    ):
        self._key = xxhash.xxh3_64_intdigest(f"{digest} {seed} {epoch}".encode())
        self._global_batch = global_batch
        self._costs = costs
        self._packs_per_batch = np.asarray(packs_per_batch, np.int64)
        self.steps = int(self._packs_per_batch.sum()) // global_batch

    def locate(self, index: int) -> tuple[int, int]:
        """Return (record batch, row in it) of pack number `index` of the epoch; index = step x global_batch + slot.

        Raises IndexError past the last step.
        """
        step, slot = divmod(index, self._global_batch)
        if not 0 <= step < self.steps:
            raise IndexError(f"pack {index} of an epoch of {self.steps * self._global_batch}")
        start = slot * self.steps
        if self._costs is None:
            return self._at(start + step)
        first = step - step % WINDOW
        window = np.arange(first, min(first + WINDOW, self.steps))
        places = [self._at(start + int(s)) for s in window]
        falling = np.argsort([-self._costs[self._first_pack[batch] + row] for batch, row in places], kind="stable")
        turn = shuffled(len(window), self._key + first)[step - first]
        return places[int(falling[turn])]

    def costs(self, step: int) -> np.ndarray:
        """Return the cost [global_batch] of each slot's pack in a step. Needs the packs' costs."""
        assert self._costs is not None
        first = step - step % WINDOW
        window = np.arange(first, min(first + WINDOW, self.steps))
        positions = np.arange(self._global_batch)[:, None] * self.steps + window
        number = np.searchsorted(self._ends, positions, side="right")
        batch = self._batches[number]
        row = positions - self._ends[number] + self._packs_per_batch[batch]
        rising = np.sort(self._costs[self._first_pack[batch] + row], axis=1)
        turn = shuffled(len(window), self._key + first)[step - first]
        return rising[:, len(window) - 1 - turn]

    def _at(self, position: int) -> tuple[int, int]:
        """Return (record batch, row in it) at a position in the line of shuffled record batches."""
        number = int(np.searchsorted(self._ends, position, side="right"))
        batch = int(self._batches[number])
        return batch, position - int(self._ends[number] - self._packs_per_batch[batch])

    @cached_property
    def _batches(self) -> np.ndarray:
        return shuffled(len(self._packs_per_batch), self._key)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self._packs_per_batch[self._batches])

    @cached_property
    def _first_pack(self) -> np.ndarray:
        return np.cumsum(self._packs_per_batch) - self._packs_per_batch


def shuffled(count: int, key: int) -> np.ndarray:
    """Return a permutation of range(count) that depends on `key` alone, not on a library's random generator.

    Sorts by splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), a bijection, so
    there are no ties.
    """
    with np.errstate(over="ignore"):
        x = (np.arange(count, dtype=np.uint64) + np.uint64(key % 2**64)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x)
