"""Batches of one data-parallel rank, in order: for training, from any number of consumed packs on, and for validation.

The whole state of training's data is one integer. Which packs a step has is a pure function of (data, seed,
global batch, consumed packs), not of the number of ranks: each rank takes an equal run of the step's slots.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import batched
from types import TracebackType
from typing import Self

from kanyun.errors import DatasetError, UserError
from kanyun.order import WINDOW, Order
from trainer.data.batch import Batch, BatchFormat
from trainer.data.loader import Loader, Pick
from trainer.data.source import PackCost, PackedData


class _Stream:
    """Base of the streams for training and validation: owns the loader."""

    def __init__(self, data: PackedData, batch_format: BatchFormat, micro_batch: int):
        self._data, self._micro_batch = data, micro_batch
        self._loader = Loader(batch_format, micro_batch, data.length, data.vision_budget)

    @property
    def wait_seconds(self) -> float:
        """Data wait since the stream was made."""
        return self._loader.wait_seconds

    def close(self) -> None:
        """End the loader's threads."""
        self._loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PackStream(_Stream):
    """Training batches of one data-parallel rank, `dp_rank` of `dp_size`. A context manager.

    Raises UserError if ranks x micro-batch does not divide the global batch, or an epoch is smaller than that.
    """

    def __init__(
        self,
        data: PackedData,
        batch_format: BatchFormat,
        *,
        seed: int,
        global_batch: int,  # packs a step, over all ranks
        micro_batch: int,  # packs
        dp_rank: int = 0,
        dp_size: int = 1,
        cost: PackCost | None = None,  # balances the ranks: the packs of one step cost about the same
    ):
        if global_batch % (dp_size * micro_batch):
            raise UserError(
                f"global_batch {global_batch} is not a multiple of {dp_size * micro_batch} ({dp_size} data-parallel "
                f"ranks x micro-batches of {micro_batch} packs): choose another global_batch or number of GPUs"
            )
        for packs in data.epochs:
            if len(packs) < global_batch:
                most = len(packs) // (dp_size * micro_batch) * dp_size * micro_batch
                remedy = f"set global_batch to at most {most}, or pack more data" if most else "pack more data"
                raise DatasetError(
                    f"{data.parent} has {len(packs)} packs in epoch {packs.epoch}, less than one global_batch of "
                    f"{global_batch}: {remedy}"
                )
        super().__init__(data, batch_format, micro_batch)
        self._seed, self._global_batch = seed, global_batch
        share = global_batch // dp_size
        self._dp_size, self._slots = dp_size, range(dp_rank * share, (dp_rank + 1) * share)
        self._costs = [packs.costs(cost) if cost else None for packs in data.epochs]
        self._order = lru_cache(maxsize=2)(self._make_order)  # of the epoch, and of the next, which is read ahead

    def steps(self, epochs: int) -> int:
        """Return the steps of the first `epochs` training epochs. Epoch e reads sampled epoch e % (number of those)."""
        each = [len(packs) // self._global_batch for packs in self._data.epochs]
        rounds, rest = divmod(epochs, len(each))
        return rounds * sum(each) + sum(each[:rest])

    def locate(self, consumed: int) -> tuple[int, int]:
        """Return (training epoch, step in it) after `consumed` packs.

        Raises UserError if that is inside of a step: they were counted with another global batch.
        """
        step, inside = divmod(consumed, self._global_batch)
        if inside:
            raise UserError(
                f"{consumed} consumed packs are not a whole number of steps of global_batch {self._global_batch}: "
                "resume with the global_batch that the run was started with"
            )
        sampled = len(self._data.epochs)
        epoch = step // self.steps(sampled) * sampled
        while self.steps(epoch + 1) <= step:
            epoch += 1
        return epoch, step - self.steps(epoch)

    def imbalance(self, consumed: int) -> float:
        """Return the largest rank's cost over the ranks' mean, in the step after `consumed` packs. Needs `cost`."""
        epoch, step = self.locate(consumed)
        ranks = self._order(epoch).costs(step).reshape(self._dp_size, -1).sum(axis=1)
        return float(ranks.max() / ranks.mean())

    def batches(self, consumed: int) -> Iterator[tuple[Batch, ...]]:
        """Return an endless iterator of each step's micro-batches, from `consumed` packs on.

        The iterator raises DatasetError if a record batch is damaged twice or an image cannot be decoded.
        """
        micro_batches = self._loader.run(self._picks(*self.locate(consumed)))
        return batched(micro_batches, len(self._slots) // self._micro_batch)

    def _make_order(self, epoch: int) -> Order:
        sampled = epoch % len(self._data.epochs)
        packs, costs = self._data.epochs[sampled], self._costs[sampled]
        return Order(packs.packs_per_batch, self._global_batch, packs.digest, self._seed, epoch, costs)

    def _picks(self, epoch: int, step: int) -> Iterator[list[Pick]]:
        """Yield the packs of each micro-batch. A shuffle window jumps among record batches, so they are cached."""
        while True:
            packs, order = self._data.epochs[epoch % len(self._data.epochs)], self._order(epoch)
            while step < order.steps:
                steps = range(step, min(step - step % WINDOW + WINDOW, order.steps))
                places = [[order.locate(s * self._global_batch + slot) for slot in self._slots] for s in steps]
                self._loader.keep(packs, {batch for of_step in places for batch, _ in of_step})
                for of_step in places:
                    for of_micro_batch in batched(of_step, self._micro_batch):
                        yield [self._loader.pick(packs, batch, row) for batch, row in of_micro_batch]
                step = steps.stop
            epoch, step = epoch + 1, 0


class ValidationStream(_Stream):
    """Each pack of the validation data once, in stored order, split over the ranks. A context manager.

    Collectives need the same number of micro-batches on every rank: the last ones are filled up with blank packs.
    """

    def __init__(
        self, data: PackedData, batch_format: BatchFormat, *, micro_batch: int, dp_rank: int = 0, dp_size: int = 1
    ):
        if not len(data.all):
            raise DatasetError(f"{data.parent} has no packs: give other validation data, or leave `validation` out")
        super().__init__(data, batch_format, micro_batch)
        self.micro_batches = -(-len(data.all) // (micro_batch * dp_size))  # on each rank
        self._first = dp_rank * self.micro_batches * micro_batch

    def batches(self) -> Iterator[Batch]:
        """Return an iterator of `micro_batches` batches. It may be called any number of times."""
        return self._loader.run(self._picks())

    def _picks(self) -> Iterator[list[Pick]]:
        packs = self._data.all
        for start in range(self._first, self._first + self.micro_batches * self._micro_batch, self._micro_batch):
            indices = range(start, start + self._micro_batch)
            places = [packs.locate(min(index, len(packs) - 1)) for index in indices]
            self._loader.keep(packs, {batch for batch, _ in places})
            yield [self._loader.pick(packs, *place, blank=i >= len(packs)) for i, place in zip(indices, places)]
