"""What this rank writes of model and optimizer."""

from collections.abc import Sequence
from typing import Any, Protocol

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from trainer.checkpoint.parts import Part
from trainer.optim.state import OptimizerState, ShardedWeights


class Saved(Protocol):
    """What `parts_of` needs of a model."""

    sharded: Sequence[ShardedWeights]

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]: ...


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


def _part(place: ShardedTensor, sources: tuple[Tensor, ...] | None) -> Part:
    values = (place.data,) if sources is None else sources
    return Part(place.key, place.global_shape, place.global_offset, place.local_shape, place.dtype, values)
