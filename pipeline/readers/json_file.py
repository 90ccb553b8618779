"""`.json` files: an array of rows, a row a line (C4, dolma), or rows over several lines (jq); plain or compressed."""

import io
import json
from collections.abc import Iterator
from typing import IO

from kanyun.storage import Folder
from pipeline.checks import MAX_ROW, malformed, too_large
from pipeline.readers.base import BEGINNING, BOM, STEP, RawRow, Reader, Split, as_row, parse
from pipeline.readers.compressed import COMPRESSED, open_raw
from pipeline.readers.lines import damage, line_rows

_SPACE = " \t\r\n"
_SNIFFED = 20  # lines


class JsonFile(Reader):
    """A row is at its number in the file, a line at its byte offset. One task streams the file."""

    suffixes = (".json", *(f".json{compressed}" for compressed in COMPRESSED))
    splittable = False

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        stream, decompressed = open_raw(root, split)
        if stream.peek(1).removeprefix(BOM).lstrip().startswith(b"["):
            yield from _array_rows(stream)
        else:
            first = list(_first_lines(stream))
            whole = io.BufferedReader(_Chained(b"".join(first), stream), STEP)
            yield from line_rows(whole, 0, None) if any(map(_is_row, first)) else _object_rows(whole)
        yield from damage(decompressed)


def _first_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Enough lines to tell a file of lines, of which some may be damaged, from an object over several lines."""
    size = 0
    for _ in range(_SNIFFED):
        if size > MAX_ROW or not (line := stream.readline(MAX_ROW + 1)):
            return
        size += len(line)
        yield line


def _is_row(line: bytes) -> bool:
    """Whether a line is a row. One that is indented is a part of a row over several lines."""
    return line.removeprefix(BOM).startswith(b"{") and isinstance(parse(line), dict)


class _Chained(io.RawIOBase):
    """`first`, and then what `rest` has."""

    def __init__(self, first: bytes, rest: IO[bytes]):
        self._first, self._rest = io.BytesIO(first), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._first.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _object_rows(stream: IO[bytes]) -> Iterator[RawRow]:
    """Rows one after another, as jq prints them, or one alone. Damage costs what is behind it."""
    text = _Text(stream)
    number = 0
    while text.skip(_SPACE + "\ufeff"):
        row, sound = text.row(number, "the file")
        yield row
        if not sound:
            return
        number += 1


def _array_rows(stream: IO[bytes]) -> Iterator[RawRow]:
    """Rows of an array, of which no more than a read and a row are in memory. Damage costs what is behind it.

    Arrays that were joined by `cat` are one.
    """
    text = _Text(stream)
    number = 0
    while beginning := text.skip(_SPACE + "\ufeff"):
        if beginning != "[":
            yield RawRow(number, text.beginning(), malformed(f"behind {number} rows the array ends, not the file"))
            return
        text.skip("[", once=True)
        first = number
        while (following := text.skip(_SPACE)) != "]":
            if number > first and following == ",":
                text.skip(",", once=True)
                text.skip(_SPACE)
            elif number > first or not following:
                yield RawRow(number, text.beginning(), malformed(f"the array is not closed after {number} rows"))
                return
            row, sound = text.row(number, "the array")
            yield row
            if not sound:
                return
            number += 1
        text.skip("]", once=True)


class _Text:
    """A stream of JSON as text, read a piece at a time. Bytes that are no UTF-8 become halves of surrogate pairs."""

    def __init__(self, stream: IO[bytes]):
        self._stream = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        self._buffer, self._at = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def skip(self, characters: str, once: bool = False) -> str:
        """Skip these characters. Return the next one, "" at the end."""
        while self._at < len(self._buffer) or self._read_on():
            if self._buffer[self._at] not in characters:
                return self._buffer[self._at]
            self._at += 1
            if once:
                break
        return ""

    def row(self, number: int, where: str) -> tuple[RawRow, bool]:
        """Return the next value as a row, and whether it is sound: else nothing behind it can be read."""
        try:
            raw, value = self._value()
        except (ValueError, RecursionError) as error:
            size = len(self._buffer) - self._at
            wrong = malformed(f"no JSON from row {number} of {where} on: {error}")
            return RawRow(number, self.beginning(), too_large(size) if size > MAX_ROW else wrong), False
        return RawRow(number, raw, as_row(value)), True

    def _value(self) -> tuple[str, object]:
        """Return the next value, as text and as Python's. Raises ValueError, RecursionError."""
        while True:
            error: ValueError | None = None
            try:
                value, end = self._decode(self._buffer, self._at)
            except ValueError as caught:
                error, end = caught, len(self._buffer)
            # A value that ends with the buffer may be the beginning of a longer one.
            if end == len(self._buffer) and len(self._buffer) - self._at <= MAX_ROW and self._read_on():
                continue
            if error:
                raise error
            start, self._at = self._at, end
            return self._buffer[start:end], value

    def beginning(self) -> str:
        return self._buffer[self._at : self._at + BEGINNING]

    def _read_on(self) -> bool:
        """Read at least as much as is there, so that a long value is not parsed for each piece of it."""
        rest = self._buffer[self._at :]
        more = self._stream.read(max(STEP, len(rest)))
        self._buffer, self._at = rest + more, 0
        return bool(more)
