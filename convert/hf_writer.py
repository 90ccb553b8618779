"""Safetensors files written tensor by tensor, in pieces: no more than the tensor at hand is in memory."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from convert.checks import Shape, require_finite
from convert.hf_weights import DTYPES, INDEX, SINGLE
from convert.memory import is_finite, pieces
from trainer.checkpoint.direct_file import DirectFile
from trainer.checkpoint.together import require_room

SHARD_BYTES = 5 * 10**9  # as the Hub recommends; a larger single tensor gets a file for itself
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    file: DirectFile
    offset: int
    tensor: Planned


class HFWriter:
    """Writes the planned tensors, in any order, and the index if there are several files.

    A file's header gives the offset of every tensor, so all shapes and dtypes are known before the first is written.
    """

    def __init__(self, folder: Path, tensors: Sequence[Planned], source: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """`source`: what an error names."""
        self._folder, self._source, self._shards = folder, source, _split(tensors, shard_bytes)
        count = len(self._shards)
        several = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        self._names = several if count > 1 else [SINGLE]
        self._places: dict[str, _Place] = {}
        self._open = ExitStack()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place, rounded to its planned dtype; threads may do so at once.

        Raises ValueError if it has not its planned shape, UserError if a value is not finite.
        """
        place = self._places.pop(name)
        if tuple(tensor.shape) != place.tensor.shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, planned was {place.tensor}")
        region = place.file.region(place.offset)
        for values in pieces(tensor):
            piece = values.to(place.tensor.dtype)
            if not is_finite(piece):
                require_finite(self._source, name, tensor.to(place.tensor.dtype))
            region.write(piece.view(torch.uint8).numpy())
        region.close()

    def __enter__(self) -> Self:
        """Raises UserError if the disk has no room for the tensors."""
        require_room(str(self._folder), sum(tensor.bytes for shard in self._shards for tensor in shard))
        for name, shard in zip(self._names, self._shards):
            size = sum(tensor.bytes for tensor in shard)
            file = self._open.enter_context(DirectFile(str(self._folder / name), size))
            self._places |= _begin(file, shard)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.__exit__(kind, error, at)
        if kind is None:
            if self._places:
                raise ValueError(f"not written: {sorted(self._places)}")
            if len(self._shards) > 1:
                self._write_index()

    def _write_index(self) -> None:
        where = {tensor.name: name for name, shard in zip(self._names, self._shards) for tensor in shard}
        total = sum(tensor.bytes for shard in self._shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """Return consecutive runs of tensors of at most `shard_bytes`, at least one tensor each."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    return shards


def _begin(file: DirectFile, shard: Sequence[Planned]) -> Mapping[str, _Place]:
    """Write a file's header; return where its tensors go. Wide dtypes come first, so that each is aligned."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers wants to know the framework
    offsets, end = {}, 0
    for tensor in sorted(shard, key=lambda tensor: -tensor.dtype.itemsize):
        offsets[tensor.name], begin = end, end
        end += tensor.bytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    region = file.region()
    region.write(len(text).to_bytes(8, "little") + text)
    region.close()
    return {tensor.name: _Place(file, 8 + len(text) + offsets[tensor.name], tensor) for tensor in shard}
