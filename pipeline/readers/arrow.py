"""Arrow IPC, as `datasets.save_to_disk` writes it (streams) and as `pyarrow.feather` does (files)."""

import io
from collections.abc import Iterator

import pyarrow as pa

from kanyun.storage import Folder
from pipeline.checks import malformed
from pipeline.readers.base import ROWS, Bytes, RawRow, Reader, Split, table_rows

_FILE_MAGIC = b"ARROW1"


class ArrowTable(Reader):
    """A row is at its number in the file. A stream does not tell where its batches are, so a task reads all of it."""

    suffixes = (".arrow", ".feather")
    splittable = False

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        position = 0
        try:
            for batch in _batches(Bytes(root, split)):
                for start in range(0, len(batch), ROWS):
                    part = batch.slice(start, ROWS)
                    yield from table_rows(part, position)
                    position += len(part)
        except (pa.ArrowException, OSError) as error:
            yield RawRow(position, "", malformed(f"{split.file} is no Arrow data from row {position} on: {error}"))


def _batches(data: Bytes) -> Iterator[pa.RecordBatch]:
    is_file = data.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    end = data.seek(0, io.SEEK_END)
    data.seek(0)
    if not is_file:
        while data.tell() < end:  # `cat` joins streams
            yield from pa.ipc.open_stream(data)
        return
    file = pa.ipc.open_file(data)
    for number in range(file.num_record_batches):
        yield file.get_batch(number)
