"""What this rank writes of model and optimizer: rectangles of tensors, and their copy in one kept host buffer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from trainer.optim.state import OptimizerState, ShardedWeights, joined
from trainer.runtime import PageLocked

_ALIGNED = 64  # bytes


class Saved(Protocol):
    """What `parts_of` needs of a model."""

    sharded: ShardedWeights | None

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor that this rank writes."""

    key: str
    global_shape: tuple[int, ...]
    at: tuple[int, ...]  # of its first element
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[Tensor, ...]  # its values; or bfloat16 weight and int16 remainder, that are joined to float32

    @property
    def size(self) -> int:
        """Bytes in the checkpoint."""
        return prod(self.shape) * self.dtype.itemsize

    def values(self) -> Tensor:
        """Return the values on the CPU, in a storage of their own."""
        sources = [source.detach().cpu() for source in self.sources]
        values = sources[0] if len(sources) == 1 else joined(*sources)
        return alone(values).view(self.shape)


def weights_of(model: Saved) -> dict[str, Any]:
    """Return what megatron.core saves of the model, or loads into."""
    return model.sharded_state_dict(metadata={"non_homogeneous_layers": True})  # one key a layer


def parts_of(model: Saved, optimizer: ChainedOptimizer | None, *, check: bool) -> list[Part]:
    """Return this rank's parts. `check`: let all ranks compare that together they have each element once."""
    weights = weights_of(model)
    state = OptimizerState(optimizer, weights, model.sharded).to_save() if optimizer else []
    tensors = {"model": weights, "optimizer": {str(number): place for number, (place, _) in enumerate(state)}}
    tensors, _ = save_preprocess(tensors, validate_access_integrity=check)
    sources = {(place.key, place.global_offset): tensor for place, tensor in state}
    return [
        _part(place, sources.get((place.key, place.global_offset)))
        for place in nested_values(tensors)
        if is_main_replica(place.replica_id)
    ]


def alone(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over its bytes alone, not copied if they are contiguous: torch.save writes storages whole."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return torch.frombuffer(flat.numpy(), dtype=tensor.dtype).view(tensor.shape) if len(flat) else tensor


def _part(place: ShardedTensor, sources: tuple[Tensor, ...] | None) -> Part:
    values = (place.data,) if sources is None else sources
    return Part(place.key, place.global_shape, place.global_offset, place.local_shape, place.dtype, values)


class HostBuffer:
    """Host memory for one copy of this rank's parts, kept for the whole run; page-locked where there is a GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = PageLocked(size, device)

    @property
    def size(self) -> int:
        return len(self._memory.bytes)

    def copy(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts with their sources copied here. When it returns, the originals may change."""
        begin, copies = 0, []
        for part in parts:
            sources = []
            for source in part.sources:
                here = self._memory.bytes[begin : begin + source.nbytes].view(source.dtype)
                copied = alone(here).view(source.shape)
                copied.copy_(source.detach(), non_blocking=self._memory.locked)
                sources.append(copied)
                begin += _aligned(source.nbytes)
            copies.append(replace(part, sources=tuple(sources)))
        if self._memory.locked:
            torch.cuda.current_stream().synchronize()
        return copies

    def close(self) -> None:
        self._memory.close()


def buffer_size(parts: Sequence[Part]) -> int:
    """Bytes that HostBuffer needs for a copy of them."""
    return sum(_aligned(source.nbytes) for part in parts for source in part.sources)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
