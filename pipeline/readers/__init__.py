"""Raw files to rows, by a file's suffix: one small class a format, which knows files and nothing of datasets."""

import posixpath
from collections.abc import Iterator
from dataclasses import replace

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.checks import MAX_ROW, RowError, malformed, too_large, without_base64
from pipeline.readers.arrow import ArrowTable
from pipeline.readers.base import BEGINNING, RawRow, Reader, Split, encodable
from pipeline.readers.compressed import uncertain
from pipeline.readers.json_file import JsonFile
from pipeline.readers.lines import CompressedJsonLines, JsonLines
from pipeline.readers.parquet import Parquet
from pipeline.readers.tar import IMAGES, WebDataset

__all__ = ["IMAGES", "SUFFIXES", "RawRow", "Split", "encodable", "holds_rows", "plan", "read"]

READERS: tuple[Reader, ...] = (
    JsonLines(),
    CompressedJsonLines(),
    JsonFile(),
    Parquet(),
    ArrowTable(),
    WebDataset(),
)
SUFFIXES = tuple(suffix for reader in READERS for suffix in reader.suffixes)
# What `datasets` writes beside its tables.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def holds_rows(file: str) -> bool:
    """Return whether a reader knows this file by its name."""
    name = posixpath.basename(file).lower()
    return name.endswith(SUFFIXES) and name not in _NO_ROWS


def read(root: Folder, split: Split) -> Iterator[RawRow]:
    """The rows of a split. What is wrong with the file is a row as well; errors of the storage are raised."""
    following = split.start
    try:
        damage = uncertain(root, split)
        for row in _reader(split.file).rows(root, split):
            if damage and not isinstance(row.fields, RowError):
                row = replace(row, fields=malformed(damage))
            yield _storable(row)
            following = row.position + 1
    except (UserError, MemoryError):
        raise
    except Exception as error:  # readers tell the damage they know; no other may end a job either
        evidence = f"{split.file} cannot be read from here on: {type(error).__name__}: {error}"
        yield RawRow(following, "", malformed(evidence))


def _storable(row: RawRow) -> RawRow:
    if len(row.raw) > MAX_ROW:
        return RawRow(row.position, encodable(row.raw[:BEGINNING]), too_large(len(row.raw)))
    raw = without_base64(row.raw) if ";base64," in row.raw else row.raw
    return replace(row, raw=encodable(raw))


def plan(files: list[tuple[str, int]], task_bytes: int) -> list[list[Split]]:
    """Tasks of about `task_bytes` each: files are split where their format can be, small ones put together.

    files: (name, bytes). What a task has room for is filled, unless it is under an eighth.
    """
    tasks: list[list[Split]] = []
    room = 0
    for name, size in files:
        splittable, start = _reader(name).splittable, 0
        while start < size:
            most = room if room > task_bytes // 8 else task_bytes
            end = min(start + most, size) if splittable else size
            if end - start > room:
                tasks.append([])
                room = task_bytes
            tasks[-1].append(Split(name, start, end, size))
            room -= end - start
            start = end
    return tasks


def _reader(file: str) -> Reader:
    return next(reader for reader in READERS if file.lower().endswith(reader.suffixes))
