"""JSON lines, plain or compressed."""

import io
from collections.abc import Iterator
from typing import IO

from kanyun.storage import Folder
from pipeline.checks import MAX_ROW, malformed, too_large
from pipeline.readers.base import BEGINNING, BOM, STEP, Bytes, RawRow, Reader, Split, parse
from pipeline.readers.compressed import COMPRESSED, Decompressed, open_raw

_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")


class JsonLines(Reader):
    """One JSON object a line, at the byte offset of the line. Blank lines are no rows."""

    suffixes = _SUFFIXES

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        position = max(split.start - 1, 0)
        stream = io.BufferedReader(Bytes(root, split, position), STEP)
        if split.start:  # the line around the byte before the split belongs to the split before, if only by its newline
            position += _skip_line(stream)
        yield from line_rows(stream, position, split.end)


class CompressedJsonLines(Reader):
    """The same, at the offset in the decompressed file. It cannot be read from its middle."""

    suffixes = tuple(lines + compressed for lines in _SUFFIXES for compressed in COMPRESSED)
    splittable = False

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        stream, decompressed = open_raw(root, split)
        yield from line_rows(stream, 0, None)
        yield from damage(decompressed)


def line_rows(stream: IO[bytes], position: int, end: int | None) -> Iterator[RawRow]:
    """The lines that start before `end`; the last one may end far behind it."""
    while (end is None or position < end) and (line := stream.readline(MAX_ROW + 1)):
        size = len(line)
        if size > MAX_ROW and not line.endswith(b"\n"):
            size += _skip_line(stream)
            yield RawRow(position, line[:BEGINNING].decode(errors="backslashreplace"), too_large(size))
        elif stripped := line.strip().removeprefix(BOM).strip():  # `cat` leaves a byte order mark within the file
            yield RawRow(position, stripped.decode(errors="backslashreplace"), parse(stripped))
        position += size


def damage(decompressed: Decompressed | None) -> Iterator[RawRow]:
    """A row for what cannot be decompressed, behind all rows that can."""
    if decompressed is not None and decompressed.error:
        evidence = f"the file cannot be decompressed from here on: {decompressed.error}"
        yield RawRow(decompressed.position, "", malformed(evidence))


def _skip_line(stream: IO[bytes]) -> int:
    """Skip to the end of this line, which may be longer than memory. Return the bytes skipped."""
    skipped = 0
    while piece := stream.readline(STEP):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
