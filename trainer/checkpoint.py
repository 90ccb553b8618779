"""Checkpoints: megatron.core's distributed format, complete or not there at all.

    OUTPUT/checkpoints/latest                   text: name of the newest complete one
    OUTPUT/checkpoints/step_00000100/           tensors as dist_checkpointing wrote them, for any number of processes
    OUTPUT/checkpoints/step_00000100/state.json where training was, and on what
    OUTPUT/checkpoints/step_00000100/hf/        config.json, tokenizer, processor settings: verbatim

A checkpoint is written into a hidden folder and renamed when it is complete; `latest` is replaced after that.
"""

import io
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from kanyun.errors import UserError
from kanyun.fingerprint import copy_tokenizer
from kanyun.storage import Folder
from trainer.models.language import LanguageModel
from trainer.optim.state import OptimizerState

_STEP = re.compile(r"step_\d{8}")


@dataclass(frozen=True)
class State:
    """state.json: how far training is, and what must be the same to go on."""

    step: int  # optimizer steps done, skipped ones too; 0 = a converted model
    consumed: int  # packs
    skipped: int  # steps whose gradient was not finite
    fingerprint: str  # of tokenizer and processor settings
    model: dict[str, Any]  # ModelConfig
    run: dict[str, Any]  # key of the config (or "data digest") -> value; empty for a converted model

    def require(self, other: "State", where: str) -> None:
        """Raises UserError if going on from `self`, found at `where`, as `other` would be another training."""
        known = {"tokenizer fingerprint": self.fingerprint, **_flat(self.model), **self.run}
        wanted = {"tokenizer fingerprint": other.fingerprint, **_flat(other.model), **other.run}
        for name, value in known.items():
            if wanted.get(name) != value:
                raise UserError(
                    f"{where} was made with {name} {value}, this run has {wanted.get(name)}: set it back, "
                    "or start a new run in another output folder"
                )


def checkpoints_of(output: Folder) -> Folder:
    return output / "checkpoints"


def latest(output: Folder) -> Folder | None:
    """The newest complete checkpoint of a run folder, if there is one."""
    root = checkpoints_of(output)
    return root / root.read("latest").decode().strip() if root.exists("latest") else None


def resolve(path: str) -> Folder:
    """The one checkpoint that a run folder, its checkpoints folder, or a step folder stands for.

    Raises UserError if there is none.
    """
    given = Folder(path)
    for folder in (given, latest(given), latest(given.parent) if given.name == "checkpoints" else None):
        if folder is not None and folder.exists("state.json"):
            return folder
    raise UserError(
        f"{path} is no checkpoint: give a run's output folder, or one step_... folder below its checkpoints/"
    )


def read_state(step: Folder) -> State:
    """Raises UserError if state.json is not what this code writes."""
    try:
        values = json.loads(step.read("state.json"))
        return State(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{step.uri}/state.json cannot be read ({error}): use another checkpoint") from error


def save(
    output: Folder,
    state: State,
    model: LanguageModel,
    optimizer: ChainedOptimizer | None,
    hf: Folder,
    keep_last: int = 1,
) -> Folder:
    """Write a checkpoint of the run in `output` and make it the latest; older ones than `keep_last` go.

    Every rank calls it. `hf` is the folder whose config.json, tokenizer and processor settings are copied. Killed at
    any moment, the checkpoint before is still whole and the latest. Returns the checkpoint's folder.
    """
    root = checkpoints_of(output)
    final = root / f"step_{state.step:08d}"
    attempt = root / f".attempt-{final.name}"
    if dist.get_rank() == 0:
        remove_leftovers(output)
        attempt.make()
    dist.barrier()
    tensors = {"model": _weights(model)}
    if optimizer is not None:
        tensors["optimizer"] = OptimizerState(optimizer, tensors["model"]).tensors
    dist_checkpointing.save(tensors, attempt.path)
    if dist.get_rank() == 0:
        copy_tokenizer(hf, attempt / "hf")
        for name in ("config.json", "generation_config.json"):
            if hf.exists(name):
                (attempt / "hf").write(name, hf.read(name))
        attempt.write("state.json", (json.dumps(asdict(state), indent=2) + "\n").encode())
        _remove(final)  # left by a run that was killed before it could move `latest`
        attempt.move_to(final)
        root.write("latest", f"{final.name}\n".encode())
        steps = [name for name in root.names() if _STEP.fullmatch(name)]
        done = steps[: steps.index(final.name) + 1]  # what follows is of a run that died before it could move `latest`
        for name in set(steps) - set(done[-keep_last:]):
            _remove(root / name)
    dist.barrier()
    return final


def load(step: Folder, model: LanguageModel, optimizer: ChainedOptimizer | None = None) -> None:
    """Fill model, and optimizer if given, from a checkpoint. Every rank calls it.

    Raises UserError if the checkpoint is damaged, has other tensors, or holds anything but plain data.
    """
    _refuse_code(step)
    model.load_state_dict(_read(step, _weights(model)))
    if optimizer is not None:
        # Last: on a CPU master weights are the model's own, and those of a GPU's checkpoint are rounded.
        state, done = OptimizerState(optimizer, _weights(model)), read_state(step)
        _read(step, state.tensors)
        state.loaded(done.step - done.skipped)


def remove_leftovers(output: Folder) -> None:
    """Delete what a killed run had begun to write, or to delete."""
    root = checkpoints_of(output)
    for name in root.names():
        if name.startswith("."):
            root.delete(name)


def _remove(folder: Folder) -> None:
    """Delete a checkpoint; killed half-way, no half of it is left under its name."""
    if folder.exists():
        hidden = folder.parent / f".removed-{folder.name}"
        folder.move_to(hidden)
        hidden.delete()


def _weights(model: LanguageModel) -> dict[str, Any]:
    """What megatron.core saves of the model, or loads into."""
    weights: dict[str, Any] = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})  # one key a layer
    return weights


def _read(step: Folder, tensors: dict[str, Any]) -> dict[str, Any]:
    """`tensors`, filled from a checkpoint. Raises UserError, see load."""
    try:
        read: dict[str, Any] = dist_checkpointing.load(tensors, step.path)
    except (CheckpointException, CheckpointingException, OSError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise UserError(f"{step.uri} does not hold this model ({str(cause)[:200]}): use another checkpoint") from error
    return read


class _PlainMetadata(pickle.Unpickler):
    """Reads torch's .metadata, a pickle that may make torch's own records and nothing else."""

    _RECORDS = (
        "Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata BytesStorageMetadata "
        "ChunkStorageMetadata _MEM_FORMAT_ENCODING"
    )
    _ALLOWED: Mapping[str, list[str]] = {
        "torch": ["Size", "float32", "bfloat16"],
        "torch.serialization": ["_get_layout"],
        "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
        "torch.distributed.checkpoint.metadata": _RECORDS.split(),
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._ALLOWED.get(module, []):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _refuse_code(step: Folder) -> None:
    """torch and megatron.core unpickle two things of a checkpoint without care, so they are looked at with care first.

    Raises UserError if they could run code.
    """
    try:
        metadata: Metadata = _PlainMetadata(io.BytesIO(step.read(".metadata"))).load()
        for index, stored in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                data = step.read(stored.relative_path, stored.offset, stored.length)
                torch.load(io.BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, OSError) as error:
        raise UserError(f"{step.uri} is no checkpoint of plain data ({error}): do not use it") from error


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """{"vision": {"depth": 2}} -> {"model vision depth": 2}; lists as tuples, as JSON does not tell them apart."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        nested = _flat(value) if isinstance(value, dict) else {"": list(value) if isinstance(value, tuple) else value}
        flat |= {f"{name} {inner}".strip(): deep for inner, deep in nested.items()}
    return flat
