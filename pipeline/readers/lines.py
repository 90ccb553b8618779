"""JSON lines, plain or compressed."""

import io
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa

from kanyun.storage import Folder
from pipeline.checks import MAX_ROW, malformed, too_large
from pipeline.readers.base import SHOWN, STEP, Bytes, RawRow, Reader, Split, parse

_BOM = b"\xef\xbb\xbf"
_PIECE = 64 << 10  # bytes decompressed at a time: at damage, what has been read of the piece is lost
_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")


class JsonLines(Reader):
    """One JSON object a line, at the byte offset of the line. Blank lines are no rows."""

    suffixes = _SUFFIXES

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        position = max(split.start - 1, 0)
        stream = io.BufferedReader(Bytes(root, split, position), STEP)
        if split.start:  # the line around the byte before the split belongs to the split before, if only by its newline
            position += _skip_line(stream)
        yield from _rows(stream, position, split.end)


class CompressedJsonLines(Reader):
    """The same, at the offset in the decompressed file. It cannot be read from its middle."""

    suffixes = tuple(lines + compressed for lines in _SUFFIXES for compressed in (".gz", ".zst"))
    splittable = False

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        compression = "gzip" if split.file.lower().endswith(".gz") else "zstd"
        stream = _Decompressed(pa.CompressedInputStream(Bytes(root, split), compression))
        yield from _rows(io.BufferedReader(stream, STEP), 0, None)
        if stream.error:
            yield RawRow(
                stream.position, "", malformed(f"the file cannot be decompressed from here on: {stream.error}")
            )


class _Decompressed(io.RawIOBase):
    """A compressed stream as Python's io wants it: at damage it ends, and `error` tells."""

    error: Exception | None = None
    position = 0

    def __init__(self, source: pa.NativeFile):
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(min(len(buffer), _PIECE))
        except (pa.ArrowException, OSError) as error:
            self.error, data = error, b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _rows(stream: IO[bytes], position: int, end: int | None) -> Iterator[RawRow]:
    """The lines that start before `end`; the last one may end far behind it."""
    while (end is None or position < end) and (line := stream.readline(MAX_ROW + 1)):
        size = len(line)
        if size > MAX_ROW and not line.endswith(b"\n"):
            size += _skip_line(stream)
            yield RawRow(position, line[:SHOWN].decode(errors="backslashreplace"), too_large(size))
        elif stripped := line.removeprefix(_BOM).strip() if position == 0 else line.strip():
            yield RawRow(position, stripped.decode(errors="backslashreplace"), parse(stripped))
        position += size


def _skip_line(stream: IO[bytes]) -> int:
    """Bytes up to the end of this line, which may be longer than memory."""
    skipped = 0
    while piece := stream.readline(STEP):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
