"""One rank's files of a checkpoint, written and digested in one pass."""

import io
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, cast

import torch
import xxhash

from kanyun.errors import UserError
from kanyun.storage import Folder
from kanyun.storage.retries import call_with_retry
from trainer.checkpoint.direct_file import DirectFile
from trainer.checkpoint.metadata import COMMON, Record
from trainer.checkpoint.parts import Part
from trainer.checkpoint.state import FileDigest
from trainer.checkpoint.store import sync_file

FILES = 4  # of a rank, each written by a thread: one waits for the disk while another computes
_PIECE = 1 << 20  # bytes: digested while a core's cache still holds what was written


class DigestedStream:
    """A file that is written; counts and digests its bytes. torch.save hides errors, so the first is kept."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._total = stream, xxhash.xxh3_128()
        self.size = 0
        self.error: Exception | None = None

    def write(self, data: Any) -> int:
        for begin in range(0, len(data), _PIECE):
            piece = data[begin : begin + _PIECE]
            try:
                self._stream.write(piece)
            except Exception as error:
                self.error = self.error or error
                raise
            self._total.update(piece)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass

    def save(self, value: Any) -> tuple[int, int]:
        """Append what torch.save makes of a value. Return its offset and size. Raises the storage's own error."""
        begin = self.size
        try:
            torch.save(value, cast(IO[bytes], self))
        except Exception as error:
            raise self.error or error from None
        return begin, self.size - begin

    @property
    def digest(self) -> FileDigest:
        return FileDigest(self.size, self._total.hexdigest())


def write_parts(folder: Folder, rank: int, parts: Sequence[Part]) -> tuple[list[Record], dict[str, FileDigest]]:
    """Write this rank's parts into `folder`, flushed to the disk, read back where that is not local.

    Raises UserError or OSError if the storage refuses.
    """
    torch.serialization.set_crc32_options(False)  # files have a digest; a second sum would cost as much as writing
    files = [(f"__{rank}_{number}.distcp", group) for number, group in enumerate(_groups(parts))]
    with ThreadPoolExecutor(FILES, "checkpoint") as pool:
        written = list(pool.map(lambda file: _write_file(folder, *file, common=file[0] == "__0_0.distcp"), files))
    records = [record for in_file, _ in written for record in in_file]
    return records, {name: digest for (name, _), (_, digest) in zip(files, written, strict=True)}


def write_bytes(folder: Folder, name: str, data: bytes) -> FileDigest:
    """Write a small file."""
    folder.write(name, data)
    return FileDigest(len(data), xxhash.xxh3_128_hexdigest(data))


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Split the parts over at most FILES files, weights apart from the optimizer, which conversion need not read."""
    weights = [part for part in parts if not part.key.startswith("optimizer.")]
    optimizer = [part for part in parts if part.key.startswith("optimizer.")]
    if not optimizer:
        return _even(weights, FILES) or [[]]
    return (_even(weights, 1) or [[]]) + _even(optimizer, FILES - 1)


def _even(parts: Sequence[Part], count: int) -> list[list[Part]]:
    """Split into at most `count` groups of nearly equal bytes: the largest part first, to the smallest group so far."""
    groups: list[list[Part]] = [[] for _ in range(count)]
    sizes = [0] * count
    for part in sorted(parts, key=lambda part: -part.size):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(part)
        sizes[smallest] += part.size
    return [group for group in groups if group]


def _write_file(folder: Folder, name: str, parts: Sequence[Part], *, common: bool) -> tuple[list[Record], FileDigest]:
    records, digest = call_with_retry(lambda: _write_once(folder, name, parts, common=common))
    if folder.is_local:
        sync_file(posixpath.join(folder.path, name))
    elif (stored := folder.digest(name)) != digest.xxh3:
        raise UserError(f"{folder.uri}/{name} reads back as {stored}, written was {digest.xxh3}")
    return records, digest


def _write_once(folder: Folder, name: str, parts: Sequence[Part], *, common: bool) -> tuple[list[Record], FileDigest]:
    records = []
    with _new_file(folder, name) as file:
        stream = DigestedStream(file)
        if common:
            buffer = io.BytesIO()
            torch.save([{}], buffer)
            stream.write(buffer.getvalue())
            records.append(Record(COMMON, (), (), None, None, name, 0, stream.size))
        for part in parts:
            place = stream.save(part.values())
            records.append(Record(part.key, part.global_shape, part.at, part.shape, part.dtype, name, *place))
    return records, stream.digest


@contextmanager
def _new_file(folder: Folder, name: str) -> Iterator[Any]:
    """Open a file of a folder that is there for writing, from its start to its end."""
    if not folder.is_local:
        with folder.create(name) as stream:
            yield stream
        return
    with DirectFile(posixpath.join(folder.path, name)) as file:
        region = file.region()
        yield region
        region.close()
