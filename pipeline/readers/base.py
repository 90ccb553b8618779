"""What all raw file formats share: splits, rows, and a file as a stream of ranges."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.checks import RowError, malformed

STEP = 4 << 20  # bytes a read
BEGINNING = 1000  # characters kept of a row that is over MAX_ROW
BOM = b"\xef\xbb\xbf"
ROWS = 64  # of a table as Python objects at a time: they may have images in them


@dataclass(frozen=True)
class Split:
    """The rows that start in a range of bytes of a file."""

    file: str  # relative to the raw folder
    start: int
    end: int
    file_size: int


@dataclass(frozen=True)
class RawRow:
    position: int  # see each format: together with the file's name it makes the sample_id
    raw: str  # the row as it came, as text; binary values and base64 replaced by their length
    fields: dict[str, Any] | RowError
    members: dict[str, bytes] = field(default_factory=dict)  # files that came with the row: an image may name one


class Reader:
    """A format. Memory is bounded by a row or a batch of the file, never by the file."""

    suffixes: ClassVar[tuple[str, ...]]
    splittable: ClassVar[bool] = True  # if not, a task reads a whole file

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        raise NotImplementedError


class Bytes(io.RawIOBase):
    """A file, read by ranges. Errors of the storage are UserErrors, so that none is taken for damage in the file."""

    def __init__(self, root: Folder, split: Split, position: int = 0):
        self._root, self._name, self._position, self._size = root, split.file, position, split.file_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        """A length in a damaged file may ask for more memory than there is."""
        left = max(self._size - self._position, 0)
        return super().read(left if size < 0 else min(size, left))

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._size - self._position), 0)
        try:
            data = self._root.read(self._name, self._position, count) if count else b""
        except FileNotFoundError:
            data = b""
        if count and not data:
            where = f"{self._root.uri}/{self._name}"
            raise UserError(
                f"{where} has changed since it was listed: run the stage again when the raw data is at rest"
            )
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def parse(line: bytes) -> dict[str, Any] | RowError:
    """Return the JSON object in `line`, or what is wrong with it."""
    try:
        return as_row(json.loads(line.removeprefix(BOM).decode()))
    except UnicodeDecodeError as error:
        return malformed(f"invalid UTF-8 at byte {error.start} of the row: {line[error.start : error.start + 8]!r}")
    except (ValueError, RecursionError) as error:
        return malformed(f"no JSON: {error}")


def as_row(value: Any) -> dict[str, Any] | RowError:
    return value if isinstance(value, dict) else malformed(f"the row is {value!r:.200}, an object is needed")


def row_text(fields: dict[str, Any]) -> str:
    """Return a row as text, with binary values replaced by their length."""
    try:
        return json.dumps(fields, ensure_ascii=False, default=_text_of)
    except TypeError:  # keys of a table's map may be bytes, dates ...
        return json.dumps(_with_text_keys(fields), ensure_ascii=False, default=_text_of)


class Unreadable:
    """A table's value that Python cannot hold: text of invalid UTF-8, a time in an unknown time zone."""

    def __init__(self, error: Exception):
        self._error = error

    def __repr__(self) -> str:
        return f"a value that cannot be read: {type(self._error).__name__}: {self._error}"


def table_rows(batch: pa.RecordBatch, position: int) -> Iterator[RawRow]:
    """Rows of a batch, of which the first is at `position`.

    All objects of a column have the same fields, with null where the row had none: the arguments of a tool call have
    those of all calls. Such a field is left out. A map, as Spark writes it, is an object.
    """
    columns = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns)}
    for number in range(len(batch)):
        fields = {name: values[number] for name, values in columns.items()}
        yield RawRow(position + number, row_text(fields), {name: _filled(value) for name, value in fields.items()})


def _filled(value: Any) -> Any:
    match value:
        case list():
            return [_filled(one) for one in value]
        case dict():
            return {name: _filled(one) for name, one in value.items() if one is not None}
    return value


def _with_text_keys(value: Any) -> Any:
    match value:
        case list():
            return [_with_text_keys(one) for one in value]
        case dict():
            return {str(name): _with_text_keys(one) for name, one in value.items()}
    return value


def _values(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist(maps_as_pydicts="strict"))
    except Exception as error:  # whatever is in a file may not end a job
        if len(column) == 1:
            return [Unreadable(error)]
        return [value for number in range(len(column)) for value in _values(column.slice(number, 1))]


def _text_of(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def encodable(text: str) -> str:
    """Return `text` as UTF-8 can hold it: half of a surrogate pair, or a byte of a file's name, as an escape."""
    return text.encode(errors="backslashreplace").decode()
