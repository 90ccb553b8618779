"""Arrow IPC, as `datasets.save_to_disk` writes it."""

from collections.abc import Iterator

import pyarrow as pa

from kanyun.storage import Folder
from pipeline.checks import malformed
from pipeline.readers.base import ROWS, Bytes, RawRow, Reader, Split, table_rows


class ArrowTable(Reader):
    """A stream of record batches; a row is at its number in the file. The offsets of batches are known to no one."""

    suffixes = (".arrow",)
    splittable = False

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        position = 0
        try:
            for batch in pa.ipc.open_stream(Bytes(root, split)):
                for start in range(0, len(batch), ROWS):
                    part = batch.slice(start, ROWS)
                    yield from table_rows(part, position)
                    position += len(part)
        except (pa.ArrowException, OSError) as error:
            yield RawRow(position, "", malformed(f"{split.file} is no Arrow stream from row {position} on: {error}"))
