"""Parquet, with images in its columns or without."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from kanyun.storage import Folder
from pipeline.checks import malformed
from pipeline.readers.base import ROWS, STEP, Bytes, RawRow, Reader, Split, table_rows


class Parquet(Reader):
    """Any columns; a row is at its number in the file. A row group belongs to the split in which it starts."""

    suffixes = (".parquet",)

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        try:
            file = pq.ParquetFile(Bytes(root, split), buffer_size=STEP)
        except (pa.ArrowException, OSError) as error:
            if split.start == 0:
                yield RawRow(0, "", malformed(f"{split.file} is no parquet file: {error}"))
            return
        first = 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if split.start <= _start(group) < split.end:
                yield from self._group(file, number, first)
            first += group.num_rows

    def _group(self, file: pq.ParquetFile, number: int, first: int) -> Iterator[RawRow]:
        group = file.metadata.row_group(number)
        end, position = first + group.num_rows, first
        rows = max(1, min(ROWS, 4 * STEP * group.num_rows // max(group.total_byte_size, 1)))
        try:
            for batch in file.iter_batches(rows, row_groups=[number]):
                yield from table_rows(batch, position)
                position += len(batch)
        except (pa.ArrowException, OSError) as error:
            for lost in range(position, end):
                yield RawRow(lost, "", malformed(f"row group {number} is damaged: {error}"))


def _start(group: pq.RowGroupMetaData) -> int:
    """Return where a row group starts, in bytes of the file."""
    if not group.num_columns:
        return 0
    column = group.column(0)
    return min(offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset is not None)
