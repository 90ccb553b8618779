"""The model's weights in a megatron checkpoint, read without a model.

Tensors are whole to a reader, in whatever pieces the ranks that trained wrote them.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, Metadata

from convert.checks import Shape, refuse, shape_faults
from kanyun.errors import UserError
from trainer.checkpoint.metadata import _PlainMetadata

PARTS = ("language.", "vision.")  # what else is in a checkpoint is the optimizer's


class MegatronWeights:
    """The tensors of one step folder, read one at a time; no process group, whatever world size saved them."""

    def __init__(self, step: Path) -> None:
        self._step = step
        self._reader = _Reader(step)
        metadata = self._reader.read_metadata()
        self._stored: dict[str, Any] = {
            name: tensor for name, tensor in metadata.state_dict_metadata.items() if name.startswith(PARTS)
        }
        places = (metadata.storage_data or {}).items()
        self.files = sorted({place.relative_path for index, place in places if index.fqn in self._stored})

    def require(self, shapes: Mapping[str, Shape]) -> None:
        """Raise one UserError with every fault, unless the checkpoint has exactly these tensors."""
        stored = {name: (tuple(tensor.size), tensor.properties.dtype) for name, tensor in self._stored.items()}
        refuse(self._step, shape_faults(stored, shapes))

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._stored[name].properties.dtype
        return dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self._stored[name].size, dtype=self.dtype(name))
        try:
            checkpoint.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:  # whose text is a traceback
            raise UserError(f"{self._step} is damaged, {name} cannot be read: use another checkpoint") from error
        return tensor


class _Reader(FileSystemReader):
    """Reads the table of contents once, not once a tensor, and runs no code that a pickle may hold."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            try:
                self._metadata = _PlainMetadata(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
            except (pickle.UnpicklingError, EOFError, OSError) as error:
                raise UserError(f"{self.path} is no checkpoint ({error}): use another one") from error
        return self._metadata
