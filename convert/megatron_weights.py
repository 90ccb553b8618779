"""The model's weights in a megatron checkpoint, read without a model.

Tensors are whole to a reader, in whatever pieces the ranks that trained wrote them.
"""

from collections.abc import Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from convert.checks import Shape, refuse, shape_faults
from convert.memory import Scratch, read_into
from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.checkpoint.metadata import read_metadata

PARTS = ("language.", "vision.")  # what else is in a checkpoint is the optimizer's


class MegatronWeights:
    """The tensors of one step folder, read one at a time; no process group, whatever world size saved them."""

    def __init__(self, step: Path) -> None:
        self._step, self._scratch, self._scratch_of_piece = step, Scratch(), Scratch()
        metadata = read_metadata(Folder(str(step)))
        self._stored: dict[str, Any] = {
            name: tensor for name, tensor in metadata.state_dict_metadata.items() if name.startswith(PARTS)
        }
        self._pieces: dict[str, list[tuple[MetadataIndex, Any]]] = {name: [] for name in self._stored}
        for index, place in (metadata.storage_data or {}).items():
            if index.fqn in self._pieces:
                self._pieces[index.fqn].append((index, place))
        self.files = sorted({place.relative_path for pieces in self._pieces.values() for _, place in pieces})

    def require(self, shapes: Mapping[str, Shape]) -> None:
        """Raise one UserError with every fault, unless the checkpoint has exactly these tensors."""
        stored = {name: (tuple(tensor.size), tensor.properties.dtype) for name, tensor in self._stored.items()}
        refuse(self._step, shape_faults(stored, shapes))

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._stored[name].properties.dtype
        return dtype

    def place(self, name: str) -> tuple[str, int]:
        """Return where a tensor begins: file, byte. Reading in this order reads each file from its start to its end."""
        return min((place.relative_path, place.offset) for _, place in self._pieces[name])

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor into this thread's memory, where it stays until the thread reads another one.

        Raises UserError if a piece is missing or damaged.
        """
        shape = tuple(self._stored[name].size)
        pieces = [(tuple(index.offset or ()), place) for index, place in self._pieces[name]]
        if len(pieces) == 1:
            whole = self._piece(name, pieces[0][1], self._scratch)
            found = whole.numel()
        else:
            dtype = self.dtype(name)
            whole, found = self._scratch.take(prod(shape) * dtype.itemsize).view(dtype).view(shape), 0
            for begin, place in pieces:
                piece = self._piece(name, place, self._scratch_of_piece)
                region = tuple(slice(at, at + length) for at, length in zip(begin, piece.shape, strict=True))
                whole[region] = piece
                found += piece.numel()
        if found != prod(shape):
            raise UserError(f"{self._step} does not hold every piece of {name}: use another checkpoint")
        return whole

    def _piece(self, name: str, place: Any, scratch: Scratch) -> Tensor:
        try:
            with FileIO(self._step / place.relative_path) as file:
                # On the meta device torch reads no values, and says where they begin in what it was given.
                view = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
                outline: Tensor = torch.load(view, weights_only=True, map_location="meta")
                stored: Any = outline.untyped_storage()
                memory = scratch.take(stored.nbytes())
                read_into(file, place.offset + stored._checkpoint_offset, memory)
            return memory.view(outline.dtype).as_strided(outline.shape, outline.stride(), outline.storage_offset())
        except Exception as error:  # damaged bytes can raise any error in the unpickler
            raise UserError(f"{self._step} is damaged, {name} cannot be read: use another checkpoint") from error
