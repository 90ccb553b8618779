"""Loading a checkpoint, for any number of ranks: digests first, then the tensors, then that they are finite."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from kanyun.errors import UserError
from kanyun.storage import Folder
from kanyun.transfer import copy_folder
from trainer.checkpoint.faults import is_finite, require_digests
from trainer.checkpoint.metadata import refuse_code
from trainer.checkpoint.model_parts import weights_of
from trainer.checkpoint.state import Marker
from trainer.checkpoint.store import DamagedError
from trainer.models.language import LanguageModel
from trainer.optim.state import OptimizerState


def load(step: Folder, model: LanguageModel, optimizer: ChainedOptimizer | None = None) -> None:
    """Fill model, and optimizer if given, from a checkpoint. Every rank calls it.

    Raises DamagedError, on every rank and with model and optimizer unchanged, if a file is not what was written; and
    UserError if the checkpoint has other tensors, holds anything but plain data, or values that are not finite.
    """
    with _on_local_disk(step) as local:
        _check_digests(local, step.uri)
        refuse_code(local)
        # Parts of sharded matrices are filled by reading; under their names there is no parameter to copy them to.
        with model.masters():
            model.load_state_dict(_read(local, weights_of(model), step.uri), strict=not model.sharded)
        require_finite(model.named_weights(), step.uri)
        if optimizer is not None:
            # Last: on a CPU master weights are the model's own, and those of a GPU's checkpoint are rounded.
            state = OptimizerState(optimizer, weights_of(model), model.sharded)
            tensors = state.to_load()
            _read(local, tensors, step.uri)
            require_finite(((tensor.key, tensor.data) for tensor in tensors.values()), step.uri)
            state.loaded(Marker.read(local).state.updates)
    model.publish()


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str, way_out: str = "use another checkpoint") -> None:
    """Raises UserError naming the first tensor that has a NaN or an infinite value."""
    named = list(tensors)
    flags = [is_finite(tensor.detach()) for _, tensor in named]
    for (name, tensor), finite in zip(named, flags, strict=True):
        if not finite:
            bad = int((~torch.isfinite(tensor.detach())).sum())
            raise UserError(
                f"{where}: {name} has {bad:,} of {tensor.numel():,} values that are NaN or infinite: {way_out}"
            )


@contextmanager
def _on_local_disk(step: Folder) -> Iterator[Folder]:
    """Yield the checkpoint on a local disk. From elsewhere one rank a node fetches it, in parallel, for the block."""
    if step.is_local:
        yield step
        return
    job = os.environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))
    copy = Folder(str(Path(tempfile.gettempdir(), f"kanyun-{job}-{step.name}")))
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        if first:
            copy_folder(step, copy, f"fetching {step.name}")
        dist.barrier()
        yield copy
        dist.barrier()
    finally:
        if first:
            copy.delete()


def _check_digests(step: Folder, where: str) -> None:
    """Each rank checks its share of the files. Raises DamagedError on every rank if one differs."""
    names = sorted(Marker.read(step).files or [])[dist.get_rank() :: dist.get_world_size()]
    error: list[Any] = [None] * dist.get_world_size()
    mine = None
    try:
        if not require_digests(step, names.__contains__, where) and dist.get_rank() == 0:
            print(f"{where}: no digest recorded, so its content cannot be checked", flush=True)
    except (UserError, OSError) as damaged:
        mine = str(damaged)
    dist.all_gather_object(error, mine)
    for sentence in filter(None, error):
        raise DamagedError(sentence)


def _read(step: Folder, tensors: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `tensors`, filled from a checkpoint. Raises UserError, see load."""
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(tensors, step.path)
    except (CheckpointException, CheckpointingException, OSError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise UserError(f"{where} does not hold this model ({str(cause)[:200]}): use another checkpoint") from error
    return loaded
