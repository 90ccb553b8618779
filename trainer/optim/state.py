"""What a checkpoint holds of the optimizer: master weights and both moments, every rank its own part.

megatron.core's DistributedOptimizer gives a data-parallel rank a range of a parameter's elements. Of a matrix that is
at most three rectangles: the end of a row, whole rows, the start of a row. Each is written under the parameter's name
and place, so nothing is gathered, and any number of ranks, however a model is split over them, reads its part again.
megatron.core's own `fully_reshardable` holds all of it in every rank's memory: 91 GB each for 7B.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerState:
    """This rank's part, as `tensors` to save, or to load into.

    They are the optimizer's own, so loading changes it at once; but master weights that are stored in two parts, on a
    GPU, are joined to float32 copies: whatever the device, a checkpoint has them whole. On the CPU, where they go
    anyway: a GPU that trains has no room for copies.
    """

    def __init__(self, optimizer: ChainedOptimizer, model_state: dict[str, Any]) -> None:
        """model_state: what the model's sharded_state_dict returned."""
        (sharded,) = optimizer.chained_optimizers  # a second one would be of experts
        self._adam = sharded.optimizer
        self._in_two_parts: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, remainder, their join
        self.tensors: dict[str, ShardedTensor] = {}
        places = {entry.data: entry for entry in nested_values(model_state)}
        for parameter, start, shard in _shards(sharded):
            state, master = self._adam.state[shard], shard.detach()
            if "master_param" in state:
                weight, remainder = master, state["master_param"]
                master = joined(weight.cpu(), remainder.cpu())
                self._in_two_parts.append((weight, remainder, master))
            for name, values in {"param": master, **{moment: state[moment] for moment in MOMENTS}}.items():
                for index, part in enumerate(_rectangles(places[parameter], start, values.view(-1))):
                    key = f"optimizer.state.{name}.{part.key}"
                    self.tensors[f"{key} {index}"] = replace(part, key=key)

    def loaded(self, steps: int) -> None:
        """Call it when `tensors` were loaded; steps: that Adam has done."""
        for weight, remainder, master in self._in_two_parts:
            for target, source in zip((weight, remainder), split(master), strict=True):
                target.copy_(source)
        for group in self._adam.param_groups:
            group["step"] = steps  # where Transformer Engine's Adam counts; torch's does in each parameter's state
        for state in self._adam.state.values():
            if "step" in state:
                state["step"].fill_(steps)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> the nearest bfloat16 weight, and int16 what it lacks: as integers of the bits, the sum is the master.

    Transformer Engine's FusedAdam has them so (store_param_remainders).
    """
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of `split`."""
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def _shards(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Parameter, first element that is this rank's, and the tensor of those elements, on which Adam steps."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    group, index = optimizer.model_param_group_index_map[parameter]
                    yield parameter, ranges["param"].start, optimizer.optimizer.param_groups[group]["params"][index]


def _rectangles(place: ShardedTensor | ShardedTensorFactory, start: int, values: Tensor) -> Iterator[ShardedTensor]:
    """values: elements from `start` on of the parameter at `place`; views of them."""
    # A factory makes several of one parameter, one below the other: gate and up.
    blocks = list(nested_values(place.build())) if isinstance(place, ShardedTensorFactory) else [place]
    replica = (*place.replica_id[:2], 0)  # no other data-parallel rank has these elements
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
                replica_id=replica,
            )
        start -= rows * width


def cut(first: int, last: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Elements first .. last - 1 of a matrix of that width as (row, column, height, width) of rectangles."""
    while first < last:
        row, column = divmod(first, width)
        high = (last - first) // width if column == 0 else 0
        wide = width if high else min(width - column, last - first)
        yield row, column, max(high, 1), wide
        first += max(high, 1) * wide
