"""The model's weights in a megatron checkpoint, read without a model.

Tensors are whole to a reader, in whatever pieces the ranks that trained wrote them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from convert.checks import Shape, refuse, shape_faults
from convert.memory import MemoryFile, Scratch
from convert.read_once import ReadOnce
from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.checkpoint.metadata import Record, read_metadata
from trainer.checkpoint.state import Marker

PARTS = ("language.", "vision.")  # what else is in a checkpoint is the optimizer's


class MegatronWeights:
    """The tensors of one step folder, read one at a time; no process group, whatever world size saved them."""

    def __init__(self, step: Folder) -> None:
        self._step, self._scratch, self._scratch_of_piece = step, Scratch(), Scratch()
        self._pieces: dict[str, list[Record]] = {}
        for record in read_metadata(step):
            if record.key.startswith(PARTS):
                self._pieces.setdefault(record.key, []).append(record)
        digests = Marker.read(step).files or {}
        names = sorted({piece.file for pieces in self._pieces.values() for piece in pieces})
        self._files = {name: ReadOnce(Path(step.path, name), digests.get(name)) for name in names}

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Compare the files' digests when the block ends, which reads tensors, best in the order of their places.

        So each file is read once. Raises DamagedError, also in place of an error of the block's own, which the damage
        explains. The optimizer's files, six times as large, are not read.
        """
        try:
            yield
        finally:
            for file in self._files.values():
                file.check()

    def require(self, shapes: Mapping[str, Shape]) -> None:
        """Raise one UserError with every fault, unless the checkpoint has exactly these tensors."""
        stored = {name: (pieces[0].global_shape, pieces[0].dtype) for name, pieces in self._pieces.items()}
        refuse(Path(self._step.path), shape_faults(stored, shapes))

    def dtype(self, name: str) -> torch.dtype:
        return cast(torch.dtype, self._pieces[name][0].dtype)

    def place(self, name: str) -> tuple[str, int]:
        """Return where a tensor begins: file, byte. Reading in this order reads each file from its start to its end."""
        return min((piece.file, piece.offset) for piece in self._pieces[name])

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor into this thread's memory, where it stays until the thread reads another one.

        Raises UserError if a piece is missing or damaged.
        """
        first, *others = pieces = self._pieces[name]
        shape = first.global_shape
        if not others:
            whole = self._piece(first, self._scratch)
            found = whole.numel()
        else:
            dtype = self.dtype(name)
            whole, found = self._scratch.take(prod(shape) * dtype.itemsize).view(dtype).view(shape), 0
            for piece in sorted(pieces, key=lambda piece: (piece.file, piece.offset)):
                part = self._piece(piece, self._scratch_of_piece)
                region = tuple(slice(at, at + length) for at, length in zip(piece.at, part.shape, strict=True))
                whole[region] = part
                found += part.numel()
        if found != prod(shape):
            raise UserError(f"{self._step.uri} does not hold every piece of {name}: use another checkpoint")
        return whole

    def _piece(self, piece: Record, scratch: Scratch) -> Tensor:
        try:
            memory = scratch.take(piece.size)
            self._files[piece.file].read(piece.offset, memory)
            # On the meta device torch reads no values, and says where they begin in what it was given.
            outline: Tensor = torch.load(cast(IO[bytes], MemoryFile(memory)), weights_only=True, map_location="meta")
            stored: Any = outline.untyped_storage()
            values = memory[stored._checkpoint_offset :][: stored.nbytes()].view(outline.dtype)
            begin = values.storage_offset() + outline.storage_offset()
            return values.as_strided(outline.shape, outline.stride(), begin)
        except Exception as error:  # damaged bytes can raise any error in the unpickler
            raise UserError(
                f"{self._step.uri} is damaged, {piece.key} cannot be read: use another checkpoint"
            ) from error
