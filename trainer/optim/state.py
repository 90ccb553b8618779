"""What a checkpoint holds of the optimizer: master weights and both moments, every rank its own part.

megatron.core's DistributedOptimizer gives a data-parallel rank a range of a parameter's elements. Of a matrix that is
at most three rectangles: the end of a row, whole rows, the start of a row. Each is written under the parameter's name
and place, so nothing is gathered, and any number of ranks, however a model is split over them, reads its part again.
megatron.core's own `fully_reshardable` holds all of it in every rank's memory: 91 GB each for 7B.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from trainer.optim.remainders import split

MOMENTS = ("exp_avg", "exp_avg_sq")

type Place = ShardedTensor | ShardedTensorFactory  # a parameter's, in a checkpoint


class ShardedWeights(Protocol):
    """What OptimizerState needs of matrices that are sharded."""

    replica: int  # ranks with the same part are numbered: 0 writes it

    def shards(self) -> Iterator[tuple[Tensor, list[tuple[Place, int, slice]]]]:
        """Yield a tensor that Adam updates; for each matrix in it its place, first element, and where they are."""
        ...


type Sources = tuple[Tensor, ...]  # the values; or a master weight's bfloat16 upper half and int16 remainder


class OptimizerState:
    """This rank's part of master weights and moments, to save, or to load into.

    The tensors are the optimizer's own, so loading changes it at once. Master weights that are stored in two parts, on
    a GPU, are float32 in a checkpoint, whatever the device: the writer joins them, and loading goes by way of joined
    copies on the CPU, because a GPU that trains has no room for them.
    """

    def __init__(
        self, optimizer: ChainedOptimizer, model_state: dict[str, Any], sharded: Iterable[ShardedWeights] = ()
    ) -> None:
        """model_state: what the model's sharded_state_dict returned. `sharded`: what of the model is."""
        (only,) = optimizer.chained_optimizers  # a second one would be of experts
        self._adam = only.optimizer
        self._joins: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, remainder, their join
        # Parameter, first element, values by name, number among the ranks that have the same ones.
        self._shards: list[tuple[Place, int, dict[str, Sources], int]] = []
        places = {entry.data: entry for entry in nested_values(model_state)}
        for parameter, start, shard in _shards(only):
            self._shards.append((places[parameter], start, self._values(shard), 0))
        for weights in sharded:
            for shard, pieces in weights.shards():
                values = self._values(shard)
                for place, start, span in pieces:
                    cut_out = {name: tuple(source[span] for source in sources) for name, sources in values.items()}
                    self._shards.append((place, start, cut_out, weights.replica))

    def _values(self, shard: Tensor) -> dict[str, Sources]:
        state, master = self._adam.state[shard], shard.detach()
        moments = {name: (state[name],) for name in MOMENTS}
        return {"param": (master, state["master_param"]) if "master_param" in state else (master,), **moments}

    def to_save(self) -> list[tuple[ShardedTensor, Sources]]:
        """Return each rectangle with views of its values."""
        parts = []
        for place, start, values, replica in self._shards:
            for name, sources in values.items():
                by_source = [list(rectangles(place, start, source.view(-1), replica)) for source in sources]
                for same in zip(*by_source, strict=True):
                    key = f"optimizer.state.{name}.{same[0].key}"
                    dtype = torch.float32 if len(same) > 1 else same[0].dtype
                    parts.append((replace(same[0], key=key, data=None, dtype=dtype), tuple(r.data for r in same)))
        return parts

    def to_load(self) -> dict[str, ShardedTensor]:
        """Return rectangles to load into; call `loaded` after that."""
        tensors: dict[str, ShardedTensor] = {}
        for place, start, values, replica in self._shards:
            for name, sources in values.items():
                whole = sources[0]
                if len(sources) > 1:
                    whole = torch.empty(sources[0].shape, dtype=torch.float32)
                    self._joins.append((sources[0], sources[1], whole))
                for index, part in enumerate(rectangles(place, start, whole.view(-1), replica)):
                    key = f"optimizer.state.{name}.{part.key}"
                    tensors[f"{key} {index}"] = replace(part, key=key)
        return tensors

    def loaded(self, steps: int) -> None:
        """Take what was loaded; `steps`: that Adam has done."""
        for weight, remainder, master in self._joins:
            for target, source in zip((weight, remainder), split(master), strict=True):
                target.copy_(source)
        for group in self._adam.param_groups:
            group["step"] = steps  # where Transformer Engine's Adam counts; torch's does in each parameter's state
        for state in self._adam.state.values():
            if "step" in state:
                state["step"].fill_(steps)


def _shards(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield each parameter, its first element on this rank, and the tensor of those elements, which Adam updates."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    group, index = optimizer.model_param_group_index_map[parameter]
                    yield parameter, ranges["param"].start, optimizer.optimizer.param_groups[group]["params"][index]


def rectangles(place: Place, start: int, values: Tensor, replica: int = 0) -> Iterator[ShardedTensor]:
    """Cut `values`, the parameter's elements from `start` on, into rectangles: views of them.

    `replica`: this rank's number among the data-parallel ranks that have the same elements.
    """
    # A factory makes several of one parameter, one below the other: gate and up.
    blocks = list(nested_values(place.build())) if isinstance(place, ShardedTensorFactory) else [place]
    for block in blocks:
        rows, *columns = block.local_shape
        width = prod(columns)
        first, last = max(start, 0), min(start + len(values), rows * width)
        for row, column, high, wide in cut(first, last, width):
            begin = row * width + column - start
            shape = (high, wide) if columns else (high,)
            offset = (row, column) if columns else (row,)
            data = values[begin : begin + high * wide].view(shape)
            yield replace(
                block,
                data=data,
                dtype=data.dtype,
                local_shape=shape,
                global_offset=tuple(a + b for a, b in zip(block.global_offset, offset, strict=True)),
                axis_fragmentations=None,  # no regular grid
                replica_id=(*place.replica_id[:2], replica),
            )
        start -= rows * width


def cut(first: int, last: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row, column, height, width) of the rectangles of elements first .. last - 1 of a matrix of that width."""
    while first < last:
        row, column = divmod(first, width)
        high = (last - first) // width if column == 0 else 0
        wide = width if high else min(width - column, last - first)
        yield row, column, max(high, 1), wide
        first += max(high, 1) * wide
