"""The weights of a Hugging Face folder: safetensors files, read tensor by tensor as transformers reads them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from convert.checks import Shape, refuse, shape_faults
from kanyun.errors import UserError
from trainer.models.config import ModelConfig
from trainer.models.names import Row
from trainer.models.registry import family_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Buffers that old versions of transformers stored, and that new ones compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
# A base model saved alone: its names lack the prefix "model.", which transformers adds.
_BASE_MODEL, _VL_BASE_MODEL = ("layers.", "embed_tokens.", "norm."), ("language_model.",)
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class Stored:
    """One tensor in one file; its data is read by `load`."""

    key: str  # the name in the file
    path: Path
    file: Any

    @property
    def shape(self) -> Shape:
        return tuple(self.file.get_slice(self.key).get_shape())

    @property
    def dtype(self) -> Any:
        """torch.dtype, or what safetensors calls one that no weights are trained in."""
        name = self.file.get_slice(self.key).get_dtype()
        return DTYPES.get(name, name)

    def load(self) -> Tensor:
        """Map the tensor into memory."""
        tensor: Tensor = self.file.get_tensor(self.key)
        return tensor

    def equals(self, other: "Stored") -> bool:
        same = (self.shape, self.dtype) == (other.shape, other.dtype)
        return same and torch.equal(self.load(), other.load())


class HFWeights:
    """The tensors of a folder under their canonical names. Files are mapped into memory, not read ahead.

    Raises UserError if a file or the index is missing or damaged.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        family = family_of(config)
        self._folder, self._copies = folder, family.copies(config)
        base_model = _VL_BASE_MODEL if config.vision else _BASE_MODEL
        self._stored: dict[str, list[Stored]] = {}
        for name in _files(folder):
            try:
                file = safe_open(folder / name, framework="pt")
            except Exception as error:  # safetensors raises its own errors, OSError and FileNotFoundError alike
                raise UserError(f"{folder / name} cannot be read ({error}): download the model again") from error
            for key in file.keys():  # noqa: SIM118 - not a mapping
                prefix = "model." if key.startswith(base_model) else ""
                if not _COMPUTED.search(key):
                    self._stored.setdefault(family.canonical(prefix + key), []).append(Stored(key, folder / name, file))

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

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name][0].load()

    def _tie(self, copy: str, original: str) -> None:
        """Keep one of two tensors that config.json ties. Raises UserError if both are there and differ."""
        if copy in self._stored:
            stored = self._stored.pop(copy)
            if not stored[0].equals(self._stored.setdefault(original, stored)[0]):
                raise UserError(
                    f"{self._folder}: {copy} differs from {original}, but config.json ties them: "
                    "set tie_word_embeddings to false to keep both, or delete one"
                )


def _files(folder: Path) -> list[str]:
    """Return the names of the files that transformers reads: a single file wins over shards and their index."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
    if pickled:
        raise UserError(f"{pickled} is a pickle, which may run code: save the model as safetensors with transformers")
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}: give a Hugging Face folder with safetensors weights")


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not names:
            raise ValueError("its weight_map is empty")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{index} is damaged ({reason}): download it again, beside its shards") from error
    return names
