"""Raw files to rows, in splits of a file that tasks read on their own: jsonl and parquet."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kanyun.storage import Folder
from pipeline.checks import RowError, malformed

STEP = 4 << 20  # bytes a read
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 64  # rows at a time: they may have images in them


@dataclass(frozen=True)
class Split:
    """The rows that start in a range of bytes of a file."""

    file: str  # relative to the raw folder
    start: int
    end: int
    file_size: int


@dataclass(frozen=True)
class RawRow:
    position: int  # byte offset of the line (jsonl) or row index (parquet) in the file
    raw: str  # the row as it came, as text
    fields: dict[str, Any] | RowError


class JsonLines:
    """One JSON object a line. Blank lines are no rows."""

    suffixes = (".jsonl", ".jsonlines", ".ndjson")

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        for position, line in _lines(root, split):
            if line := line.removeprefix(_BOM).strip() if position == 0 else line.strip():
                yield RawRow(position, line.decode(errors="backslashreplace"), _parse(line))


class Parquet:
    """Any columns. A row group belongs to the split in which it starts."""

    suffixes = (".parquet",)

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        with root.fs.open(f"{root.path}/{split.file}", "rb") as stream:
            try:
                file = pq.ParquetFile(stream)
            except pa.ArrowInvalid as error:
                if split.start == 0:
                    yield RawRow(0, "", malformed(f"{split.file} is no parquet file: {error}"))
                return
            first = 0  # row index
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                if split.start <= _start(group) < split.end:
                    yield from self._group(file, number, first, group.num_rows)
                first += group.num_rows

    def _group(self, file: pq.ParquetFile, number: int, first: int, count: int) -> Iterator[RawRow]:
        position = first
        try:
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[number]):
                for row in _parquet_rows(batch):
                    yield replace(row, position=position)
                    position += 1
        except (pa.ArrowException, OSError) as error:
            for lost in range(position, first + count):
                yield RawRow(lost, "", malformed(f"row group {number} is damaged: {error}"))


READERS = (JsonLines(), Parquet())
SUFFIXES = tuple(suffix for reader in READERS for suffix in reader.suffixes)


def read(root: Folder, split: Split) -> Iterator[RawRow]:
    """The rows of a split, by the file's suffix."""
    reader = next(reader for reader in READERS if split.file.lower().endswith(reader.suffixes))
    return reader.rows(root, split)


def plan(files: list[tuple[str, int]], task_bytes: int) -> list[list[Split]]:
    """Tasks of about `task_bytes` each: large files are split, small ones put together. files: (name, bytes)."""
    tasks: list[list[Split]] = []
    room = 0
    for name, size in files:
        for start in range(0, size, task_bytes):
            split = Split(name, start, min(start + task_bytes, size), size)
            if split.end - start > room:
                tasks.append([])
                room = task_bytes
            tasks[-1].append(split)
            room -= split.end - start
    return tasks


def _lines(root: Folder, split: Split) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that start in the split; the last one may end far behind it."""
    position = max(split.start - 1, 0)
    stream = io.BufferedReader(_Range(root, split.file, position, split.file_size), STEP)
    if split.start:  # the line around the byte before the split belongs to the split before, if only by its newline
        position += len(stream.readline())
    while position < split.end and (line := stream.readline()):
        yield position, line
        position += len(line)


class _Range(io.RawIOBase):
    """A file from an offset on, read by ranges."""

    def __init__(self, root: Folder, name: str, position: int, size: int):
        self._root, self._name, self._position, self._size = root, name, position, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._position)
        data = self._root.read(self._name, self._position, count) if count > 0 else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _parse(line: bytes) -> dict[str, Any] | RowError:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return malformed(f"invalid UTF-8 at byte {error.start} of the line: {line[error.start : error.start + 8]!r}")
    except (ValueError, RecursionError) as error:
        return malformed(f"no JSON: {error}")
    return row if isinstance(row, dict) else malformed(f"the row is {row!r:.200}, an object is needed")


def _start(group: pq.RowGroupMetaData) -> int:
    column = group.column(0)
    return min(offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset is not None)


def _parquet_rows(batch: pa.RecordBatch) -> Iterator[RawRow]:
    """Rows without their positions; a value that Python cannot hold (text of invalid UTF-8) costs its row alone."""
    try:
        for fields in batch.to_pylist():
            yield RawRow(-1, json.dumps(fields, ensure_ascii=False, default=_shown), fields)
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            yield RawRow(-1, str(batch), malformed(f"a value cannot be read: {error}"))
        else:
            for index in range(len(batch)):
                yield from _parquet_rows(batch.slice(index, 1))


def _shown(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
