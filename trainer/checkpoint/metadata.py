"""torch's table of contents, `.metadata`: which bytes of which file are which rectangle of which tensor.

It is a pickle, and so is what is stored beside tensors. Both are checked with a restricted unpickler before torch and
megatron.core, which unpickle without care, see them.
"""

import io
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from kanyun.errors import UserError
from kanyun.storage import Folder

METADATA = ".metadata"
# megatron.core reads values that are no tensors under this name (the first of one); there are none, but it insists.
COMMON = "common_state/shard_0_1"
FORMAT = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'  # of metadata.json, megatron.core's


@dataclass(frozen=True)
class Record:
    """Where one rectangle of a tensor lies; `shape` None: no tensor."""

    key: str
    global_shape: tuple[int, ...]
    at: tuple[int, ...]  # of its first element
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    file: str
    offset: int  # bytes
    size: int  # bytes


def encode_metadata(records: Iterable[Record]) -> bytes:
    """Return the content of .metadata for the records of all ranks."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for record in records:
        place = _StorageInfo(record.file, record.offset, record.size)
        if record.shape is None or record.dtype is None:
            tensors[record.key] = BytesStorageMetadata()
            places[MetadataIndex(record.key)] = place
            continue
        if record.key not in tensors:
            properties = TensorProperties(dtype=record.dtype)
            tensors[record.key] = TensorStorageMetadata(properties, torch.Size(record.global_shape), [])
        chunks = tensors[record.key].chunks
        places[MetadataIndex(record.key, torch.Size(record.at), len(chunks))] = place
        chunks.append(ChunkStorageMetadata(torch.Size(record.at), torch.Size(record.shape)))
    return pickle.dumps(Metadata(tensors, storage_data=places, version=CURRENT_DCP_VERSION))


class _PlainMetadata(pickle.Unpickler):
    """Reads .metadata, which may make torch's own records and nothing else."""

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


def read_metadata(step: Folder) -> Metadata:
    """Raises UserError if .metadata is missing, damaged, or more than plain records."""
    try:
        metadata = _PlainMetadata(io.BytesIO(step.read(METADATA))).load()
    except FileNotFoundError as error:
        raise UserError(f"{step.uri}/{METADATA} is missing: use another checkpoint") from error
    except Exception as error:  # damaged bytes can raise any error in the unpickler
        raise UserError(f"{step.uri} is no checkpoint of plain data ({error}): do not use it") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{step.uri} is no checkpoint of plain data (.metadata has no records): do not use it")
    return metadata


def refuse_code(step: Folder) -> None:
    """Raises UserError if .metadata, or a value that is stored beside tensors, could run code when it is read."""
    metadata = read_metadata(step)
    for index, stored in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            data = step.read(stored.relative_path, stored.offset, stored.length)
            try:
                torch.load(io.BytesIO(data), weights_only=True)
            except Exception as error:
                raise UserError(f"{step.uri} is no checkpoint of plain data ({error}): do not use it") from error
