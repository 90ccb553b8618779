"""The weights of a Hugging Face folder: safetensors files, read tensor by tensor as transformers reads them.

Tensors are copied into memory, not mapped: the pages of mapped files stay with the process, and add up to
the whole model.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from convert.checks import Shape, refuse, require_finite, shape_faults
from convert.memory import PIECE, Scratch, is_finite, pieces, read_into
from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.models.config import ModelConfig, no_model
from trainer.models.names import Row
from trainer.models.registry import family_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Buffers that old versions of transformers stored, and that new ones compute.
COMPUTED = re.compile(r"rotary(_pos)?_emb\.inv_freq$")
# A base model saved alone: its names lack the prefix "model.", which transformers adds.
_BASE_MODEL, _VL_BASE_MODEL = ("layers.", "embed_tokens.", "norm."), ("language_model.",)
_COMPARED = 16 << 20  # bytes at a time
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class Stored:
    """One tensor in one file; its values are read by `load`."""

    key: str  # the name in the file
    path: Path
    shape: Shape
    dtype: Any  # torch.dtype, or what safetensors calls one that no weights are trained in
    begin: int  # of its bytes in the file
    size: int  # bytes

    def load(self, memory: Tensor) -> tuple[Tensor, bool]:
        """Read the tensor into `memory` [size] uint8; return it, and whether all its values are finite.

        Raises UserError if the file was cut meanwhile.
        """
        finite = True
        with FileIO(self.path) as file:
            for begin, piece in zip(range(0, self.size, PIECE), pieces(memory)):
                read_into(file, self.begin + begin, piece)
                finite = finite and is_finite(piece.view(self.dtype))
        return memory.view(self.dtype).view(self.shape), finite

    def equals(self, other: "Stored") -> bool:
        """Return whether both have the same bytes."""
        if (self.shape, self.dtype, self.size) != (other.shape, other.dtype, other.size):
            return False
        mine, theirs = torch.empty(2, min(self.size, _COMPARED), dtype=torch.uint8)
        with FileIO(self.path) as first, FileIO(other.path) as second:
            for begin in range(0, self.size, _COMPARED):
                length = min(_COMPARED, self.size - begin)
                read_into(first, self.begin + begin, mine[:length])
                read_into(second, other.begin + begin, theirs[:length])
                if not torch.equal(mine[:length], theirs[:length]):
                    return False
        return True


class HFWeights:
    """The tensors of a folder under their canonical names; each is read when it is asked for.

    Raises UserError if a file or the index is missing or damaged.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        family = family_of(config)
        self._folder, self._copies = folder, family.copies(config)
        base_model = _VL_BASE_MODEL if config.vision else _BASE_MODEL
        self._stored: dict[str, list[Stored]] = {}
        self._scratch = Scratch()
        for name in _files(folder):
            for stored in _contents(folder / name):
                prefix = "model." if stored.key.startswith(base_model) else ""
                if not COMPUTED.search(stored.key):
                    self._stored.setdefault(family.canonical(prefix + stored.key), []).append(stored)

    def require(self, rows: Sequence[Row], shapes: Mapping[str, Shape]) -> None:
        """Raise one UserError with every fault, unless the folder has the tensors of `rows` in these shapes.

        What transformers loads is accepted too: a tensor stored twice with equal values, and in a tied model an output
        head that equals the embedding, or is there in its place.
        """
        faults = [
            f"{one.key} in {one.path.name} and {other.key} in {other.path.name} differ"
            for one, *others in self._stored.values()
            for other in others
            if not one.equals(other)
        ]
        for copy, original in self._copies.items():
            self._tie(copy, original)
        stored = {
            name if name in shapes else first.key: (first.shape, first.dtype)  # left over: as the file calls it
            for name, (first, *_) in self._stored.items()
        }
        faults += shape_faults(stored, shapes)
        for row in rows:
            dtypes = {name: self._stored[name][0].dtype for name in row.hf if name in self._stored}
            if len(set(dtypes.values())) > 1 and set(dtypes.values()) <= set(DTYPES.values()):
                parts = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
                faults.append(f"{parts} become one tensor and must have one dtype")
        refuse(self._folder, faults)

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._stored[name][0].dtype
        return dtype

    def read(self, *names: str) -> list[Tensor]:
        """Read tensors into this thread's memory, one behind the other, where they stay until the thread reads others.

        Raises UserError if a value is not finite.
        """
        stored = [self._stored[name][0] for name in names]
        memory = self._scratch.take(sum(one.size for one in stored)).split([one.size for one in stored])
        loaded = [one.load(part) for one, part in zip(stored, memory)]
        for name, (tensor, finite) in zip(names, loaded):
            if not finite:
                require_finite(self._folder, name, tensor)
        return [tensor for tensor, _ in loaded]

    def _tie(self, copy: str, original: str) -> None:
        """Keep one of two tensors that config.json ties. Raises UserError if both are there and differ."""
        if copy in self._stored:
            stored = self._stored.pop(copy)
            if not stored[0].equals(self._stored.setdefault(original, stored)[0]):
                raise UserError(
                    f"{self._folder}: {copy} differs from {original}, but config.json ties them: "
                    "set tie_word_embeddings to false to keep both, or delete one"
                )


def _contents(path: Path) -> list[Stored]:
    """Return the tensors of a safetensors file. Raises UserError if it is missing or damaged."""
    try:
        with path.open("rb") as file:  # first: safetensors calls a file that may not be read a missing one
            with safe_open(path, framework="pt"):
                pass  # it has checked that the header is sound, and describes every byte of the file once
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except Exception as error:  # safetensors raises its own errors, OSError and FileNotFoundError alike
        raise UserError(f"{path} cannot be read ({error}): download the model again") from error
    header.pop("__metadata__", None)
    return [
        Stored(
            key,
            path,
            tuple(tensor["shape"]),
            DTYPES.get(tensor["dtype"], tensor["dtype"]),
            8 + length + tensor["data_offsets"][0],
            tensor["data_offsets"][1] - tensor["data_offsets"][0],
        )
        for key, tensor in header.items()
    ]


def _files(folder: Path) -> list[str]:
    """Return the names of the files that transformers reads: a single file wins over shards and their index."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
    if pickled:
        raise UserError(f"{pickled} is a pickle, which may run code: save the model as safetensors with transformers")
    for name in (SINGLE, INDEX):
        if (folder / name).is_symlink():
            target = (folder / name).readlink()
            raise UserError(f"{folder / name} links to {target}, which does not exist: download the model again")
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}: {no_model(Folder(str(folder)))}")


def _shards(index: Path) -> list[str]:
    try:
        content = json.loads(index.read_text("utf-8"))
        names = set(content["weight_map"].values())
        if not names:
            raise ValueError("its weight_map is empty")
        if odd := [name for name in names if not (isinstance(name, str) and name)]:
            raise ValueError(f"its weight_map names {odd[0]!r} as a file")
        if not isinstance(content["metadata"], dict):  # transformers reads it, too
            raise ValueError("its metadata is no object of names and values")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{index} is damaged ({reason}): download it again, beside its shards") from error
    return sorted(names)
