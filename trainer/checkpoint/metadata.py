"""torch's table of contents, `.metadata`: which bytes of which file are which rectangle of which tensor.

It is a pickle, and so is what is stored beside tensors. Both are checked with a restricted unpickler before torch and
megatron.core, which unpickle unsafely, see them.
"""

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

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
    # Here, not above: the package takes half as long to import as torch itself, and a reader needs none of it.
    from torch.distributed.checkpoint import metadata as torch_records
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

    tensors: dict[str, Any] = {}
    places: dict[torch_records.MetadataIndex, _StorageInfo] = {}
    for record in records:
        place = _StorageInfo(record.file, record.offset, record.size)
        if record.shape is None or record.dtype is None:
            tensors[record.key] = torch_records.BytesStorageMetadata()
            places[torch_records.MetadataIndex(record.key)] = place
            continue
        if record.key not in tensors:
            properties, size = torch_records.TensorProperties(dtype=record.dtype), torch.Size(record.global_shape)
            tensors[record.key] = torch_records.TensorStorageMetadata(properties, size, [])
        chunks = tensors[record.key].chunks
        at = torch.Size(record.at)
        places[torch_records.MetadataIndex(record.key, at, len(chunks))] = place
        chunks.append(torch_records.ChunkStorageMetadata(at, torch.Size(record.shape)))
    return pickle.dumps(torch_records.Metadata(tensors, storage_data=places, version=CURRENT_DCP_VERSION))


class _Stored:
    """What a pickle holds of one of torch's records: its fields as attributes, or its `state` where that is a tuple."""

    def __init__(self, *values: Any) -> None:
        self.state: Any = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Metadata(_Stored):
    pass


class _Bytes(_Stored):
    pass


_RECORDS = "torch.distributed.checkpoint.metadata"
# What .metadata may name, and what is made of it.
_PLAIN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("torch", "float32"): torch.float32,
    ("torch", "bfloat16"): torch.bfloat16,
    ("torch.serialization", "_get_layout"): str,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Stored,
    (_RECORDS, "Metadata"): _Metadata,
    (_RECORDS, "MetadataIndex"): _Stored,
    (_RECORDS, "StorageMeta"): _Stored,
    (_RECORDS, "TensorStorageMetadata"): _Stored,
    (_RECORDS, "TensorProperties"): _Stored,
    (_RECORDS, "ChunkStorageMetadata"): _Stored,
    (_RECORDS, "BytesStorageMetadata"): _Bytes,
    (_RECORDS, "_MEM_FORMAT_ENCODING"): _Stored,
}


class _PlainMetadata(pickle.Unpickler):
    """Reads .metadata, which may name torch's own records and nothing else; makes stand-ins of them."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _PLAIN[module, name]


def read_metadata(step: Folder) -> list[Record]:
    """Raises UserError if .metadata is missing, damaged, or more than plain records."""
    try:
        metadata = _PlainMetadata(io.BytesIO(step.read(METADATA))).load()
        if not isinstance(metadata, _Metadata):
            raise ValueError(".metadata has no records")
        return _records(metadata)
    except FileNotFoundError as error:
        raise UserError(f"{step.uri}/{METADATA} is missing: use another checkpoint") from error
    except Exception as error:  # damaged bytes can raise any error in the unpickler
        raise UserError(f"{step.uri} is no checkpoint of plain data ({error}): do not use it") from error


def _records(metadata: Any) -> list[Record]:
    records, tensors = [], metadata.state_dict_metadata
    shapes = {
        name: {chunk.offsets: chunk.sizes for chunk in tensor.chunks}
        for name, tensor in tensors.items()
        if not isinstance(tensor, _Bytes)
    }
    for index, place in metadata.storage_data.items():
        where = (place.relative_path, place.offset, place.length)
        if index.fqn in shapes:
            tensor, shape = tensors[index.fqn], shapes[index.fqn][index.offset]
            records.append(Record(index.fqn, tensor.size, index.offset, shape, tensor.properties.state[0], *where))
        else:
            records.append(Record(index.fqn, (), (), None, None, *where))
    return records


def refuse_code(step: Folder) -> None:
    """Raises UserError if .metadata, or a value that is stored beside tensors, could run code when it is read."""
    for record in read_metadata(step):
        if record.shape is None:
            data = step.read(record.file, record.offset, record.size)
            try:
                torch.load(io.BytesIO(data), weights_only=True)
            except Exception as error:
                raise UserError(f"{step.uri} is no checkpoint of plain data ({error}): do not use it") from error
