"""Parquet, with images in its columns or without."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from kanyun.storage import Folder
from pipeline.checks import malformed
from pipeline.readers.base import ROWS, STEP, Bytes, RawRow, Reader, Split, table_rows


class Parquet(Reader):
    """Any columns; a row is at its number in the file.

    Row groups are taken as equally large, to tell in which split each starts: to ask a damaged footer where it really
    does (`RowGroupMetaData.column`) ends the process.
    """

    suffixes = (".parquet",)

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        try:
            file = pq.ParquetFile(Bytes(root, split), buffer_size=STEP)
        except (pa.ArrowException, OSError) as error:
            if split.start == 0:
                yield RawRow(0, "", malformed(f"{split.file} is no parquet file: {error}"))
            return
        counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        if sum(counts) != file.metadata.num_rows or min(counts, default=0) < 0:
            if split.start == 0:
                evidence = (
                    f"{split.file} has a damaged footer: {file.metadata.num_rows} rows, in its row groups {counts}"
                )
                yield RawRow(0, "", malformed(evidence))
            return
        for number in range(len(counts)):
            if split.start <= split.file_size * number // len(counts) < split.end:
                yield from self._group(file, number, sum(counts[:number]))

    def _group(self, file: pq.ParquetFile, number: int, first: int) -> Iterator[RawRow]:
        group = file.metadata.row_group(number)
        end, position = first + group.num_rows, first
        rows = max(1, min(ROWS, 4 * STEP * group.num_rows // max(group.total_byte_size, 1)))
        try:
            for batch in file.iter_batches(rows, row_groups=[number]):
                yield from table_rows(batch, position)
                position += len(batch)
            if position != end:
                raise pa.ArrowInvalid(f"it has {position - first} rows, its footer says {group.num_rows}")
        except (pa.ArrowException, OSError) as error:
            for lost in range(position, end):
                yield RawRow(lost, "", malformed(f"row group {number} is damaged: {error}"))
