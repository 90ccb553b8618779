"""Arrow IPC, as `datasets.save_to_disk` writes it (streams) and as `pyarrow.feather` does (files)."""

import io
from collections.abc import Iterator

import pyarrow as pa
from pyarrow import types

from kanyun.storage import Folder
from pipeline.checks import malformed
from pipeline.readers.base import ROWS, Bytes, RawRow, Reader, Split, table_rows

_FILE_MAGIC = b"ARROW1"
_FILE_START = 8  # the magic and two bytes of padding
_FOOTER_END = 4 + len(_FILE_MAGIC)  # behind the footer: its size and the magic again
_PADDED = 64  # bytes
# Lists, and texts, of all layouts.
_LISTS = {
    types.is_list: pa.list_,
    types.is_large_list: pa.large_list,
    types.is_list_view: pa.list_view,
    types.is_large_list_view: pa.large_list_view,
}
_TEXTS = {
    types.is_string: pa.binary(),
    types.is_large_string: pa.large_binary(),
    types.is_string_view: pa.binary_view(),
}


class ArrowTable(Reader):
    """A row is at its number in the file. A stream does not tell where its batches are, so a task reads all of it."""

    suffixes = (".arrow", ".feather")
    splittable = False

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        position = 0
        try:
            for batch in _batches(Bytes(root, split)):
                batch.validate()  # its lengths
                if not len(batch) and _has_data(batch):
                    yield RawRow(position, "", malformed(f"{split.file}: a record batch with data says it has no rows"))
                    position += 1
                elif damage := _damage(batch):
                    for row in range(position, position + len(batch)):
                        yield RawRow(row, "", malformed(f"{split.file}: the record batch is damaged: {damage}"))
                else:
                    for start in range(0, len(batch), ROWS):
                        yield from table_rows(batch.slice(start, ROWS), position + start)
                position += len(batch)
        except (pa.ArrowException, OSError) as error:
            yield RawRow(position, "", malformed(f"{split.file} is no Arrow data from row {position} on: {error}"))


def _has_data(batch: pa.RecordBatch) -> bool:
    """Whether a buffer is longer than the one offset, padded, that an empty column may have."""
    return any(buffer and buffer.size > _PADDED for column in batch.columns for buffer in column.buffers())


def _damage(batch: pa.RecordBatch) -> Exception | None:
    """Return what is wrong within a batch, which IPC does not look at: one bad offset would end the whole process.

    Text that is no UTF-8 is no damage: it costs its row alone.
    """
    for column in batch.columns:
        try:
            viewed = column.view(_as_bytes(column.type))
        except pa.ArrowException:  # a type that Arrow cannot view
            viewed = column
        try:
            viewed.validate(full=True)
        except pa.ArrowException as error:
            return error
    return None


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return a type with bytes in place of texts, as which an array can be viewed."""
    for is_text, binary in _TEXTS.items():
        if is_text(kind):
            return binary
    for is_list, make in _LISTS.items():
        if is_list(kind):
            return make(_field_as_bytes(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_field_as_bytes(kind.value_field), kind.list_size)
    if types.is_map(kind):
        return pa.map_(_as_bytes(kind.key_type), _field_as_bytes(kind.item_field), kind.keys_sorted)
    if types.is_struct(kind):
        return pa.struct([_field_as_bytes(kind.field(number)) for number in range(kind.num_fields)])
    return kind


def _field_as_bytes(field: pa.Field) -> pa.Field:
    return field.with_type(_as_bytes(field.type))


def _batches(data: Bytes) -> Iterator[pa.RecordBatch]:
    """A file is a stream between its magic and its footer. Read as one: a damaged footer may not know of all batches.

    Raises ArrowException and OSError.
    """
    is_file = data.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    end = data.seek(0, io.SEEK_END)
    data.seek(_FILE_START if is_file else 0)
    while data.tell() < end:  # `cat` joins streams
        yield from pa.ipc.open_stream(data)
        if is_file:
            _check_footer(data.read())
            return


def _check_footer(rest: bytes) -> None:
    """Raises ArrowInvalid if what is behind a file's stream is no footer: rows may lie there."""
    size, magic = rest[-_FOOTER_END : -len(_FILE_MAGIC)], rest[-len(_FILE_MAGIC) :]
    if magic != _FILE_MAGIC or int.from_bytes(size, "little") + _FOOTER_END != len(rest):
        raise pa.ArrowInvalid(f"the last {len(rest)} bytes of the file are no footer")
