"""Raw files to rows, by a file's suffix: one small class a format, which knows files and nothing of datasets."""

from collections.abc import Iterator
from dataclasses import replace

from kanyun.storage import Folder
from pipeline.checks import MAX_ROW, too_large
from pipeline.readers.arrow import ArrowTable
from pipeline.readers.base import SHOWN, RawRow, Reader, Split
from pipeline.readers.lines import CompressedJsonLines, JsonLines
from pipeline.readers.parquet import Parquet
from pipeline.readers.tar import WebDataset

__all__ = ["SUFFIXES", "RawRow", "Split", "plan", "read"]

READERS: tuple[Reader, ...] = (JsonLines(), CompressedJsonLines(), Parquet(), ArrowTable(), WebDataset())
SUFFIXES = tuple(suffix for reader in READERS for suffix in reader.suffixes)


def read(root: Folder, split: Split) -> Iterator[RawRow]:
    """The rows of a split. What is wrong with the file is a row as well; errors of the storage are raised."""
    for row in _reader(split.file).rows(root, split):
        if len(row.raw) > MAX_ROW:
            yield replace(row, raw=row.raw[:SHOWN], fields=too_large(len(row.raw)))
        else:
            yield row


def plan(files: list[tuple[str, int]], task_bytes: int) -> list[list[Split]]:
    """Tasks of about `task_bytes` each: large files are split if their format can be, small ones put together.

    files: (name, bytes).
    """
    tasks: list[list[Split]] = []
    room = 0
    for name, size in files:
        step = task_bytes if _reader(name).splittable else max(size, 1)
        for start in range(0, size, step):
            split = Split(name, start, min(start + step, size), size)
            if split.end - start > room:
                tasks.append([])
                room = task_bytes
            tasks[-1].append(split)
            room -= split.end - start
    return tasks


def _reader(file: str) -> Reader:
    return next(reader for reader in READERS if file.lower().endswith(reader.suffixes))
