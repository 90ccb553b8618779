"""The weights of a Hugging Face folder: safetensors files, read and written tensor by tensor."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kanyun.errors import UserError
from trainer.models.names import require_same

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # as the Hub recommends; a larger single tensor gets a file of its own


class HFWeights:
    """The tensors of a folder under their canonical names. Files are mapped into memory, not read ahead."""

    def __init__(self, folder: Path, canonical: Callable[[str], str] = str) -> None:
        """`canonical`: the family's, which returns a tensor's name as its table spells it."""
        self._folder = folder
        self._found: list[tuple[str, str, Any]] = []  # canonical name, name in the file, open file
        for name in _files(folder):
            try:
                file = safe_open(folder / name, framework="pt")
            except Exception as error:  # safetensors raises its own errors, OSError and FileNotFoundError alike
                raise UserError(f"{folder / name} cannot be read ({error}): download the model again") from error
            self._found += [(canonical(key), key, file) for key in file.keys()]  # noqa: SIM118 - not a mapping
        self._at = {name: (key, file) for name, key, file in self._found}

    def drop_copies(self, copies: Mapping[str, str]) -> None:
        """Leave out tensors that repeat another one: name -> the one it repeats. UserError if they differ."""
        for copy, original in copies.items():
            if copy in self._at and original in self._at:
                if not torch.equal(self[copy], self[original]):
                    raise UserError(
                        f"{self._folder}: {copy} differs from {original}, but config.json says that they are tied: "
                        "set tie_word_embeddings to false, or give an unchanged model"
                    )
                self._found = [entry for entry in self._found if entry[0] != copy]

    def require(self, names: list[str]) -> None:
        """UserError unless the folder has exactly these tensors."""
        require_same([name for name, _, _ in self._found], names, str(self._folder))

    def __getitem__(self, name: str) -> Tensor:
        key, file = self._at[name]
        tensor: Tensor = file.get_tensor(key)
        return tensor


def _files(folder: Path) -> list[str]:
    if (folder / INDEX).exists():
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    if (folder / SINGLE).exists():
        return [SINGLE]
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}: give a Hugging Face folder with safetensors weights")


class HFWriter:
    """Writes tensors in the order they come, a file for each SHARD_BYTES, and the index. Holds one file's tensors."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []  # names of the tensors in each file
        self._bytes = self._pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self._bytes += tensor.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._flush()
            self._finish()

    def _flush(self) -> None:
        # transformers wants to know the framework: {"format": "pt"}.
        save_file(self._pending, self._folder / _unfinished(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        """Names that tell how many files there are, now that it is known."""
        count = len(self._shards)
        names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else [SINGLE]
        for n, name in enumerate(names):
            (self._folder / _unfinished(n)).rename(self._folder / name)
        if count > 1:
            where = {tensor: name for name, tensors in zip(names, self._shards) for tensor in tensors}
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(where.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _unfinished(shard: int) -> str:
    return f"model-{shard + 1:05d}.safetensors"
