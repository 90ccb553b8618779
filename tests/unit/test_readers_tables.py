"""The readers of parquet and Arrow files."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.checks import MAX_ROW, RowError
from pipeline.datasets import dataset
from tests.support.raw_rows import fields, rows_of


def test_a_long_text_in_a_table_is_as_long(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["short", "x" * (MAX_ROW + 1)]}), tmp_path / "a.parquet")
    short, long = rows_of(tmp_path / "a.parquet")
    assert short.fields == {"text": "short"}
    assert isinstance(long.fields, RowError)
    assert str(long.fields.reason) == "row_too_large"
    assert len(long.raw) == 1000


def test_save_to_disk(tmp_path: Path) -> None:
    """Columns as `datasets` writes them for an Image feature, in a stream of small batches."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([("messages", turn), ("images", pa.list_(image))])
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a cat"}]
    table = [{"messages": turns, "images": [{"bytes": b"%d" % n, "path": None}]} for n in range(150)]
    with pa.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", schema) as writer:
        for batch in pa.Table.from_pylist(table, schema).to_batches(max_chunksize=40):
            writer.write_batch(batch)
    rows = rows_of(tmp_path / "data-00000-of-00001.arrow", step=100)
    assert [row.position for row in rows] == list(range(150))
    samples = [dataset("messages").sample(row.fields) for row in rows if isinstance(row.fields, dict)]
    assert [sample.images for sample in samples] == [(b"%d" % n,) for n in range(150)]
    assert json.loads(rows[7].raw)["images"] == [{"bytes": "<1 bytes>", "path": None}]

    whole = (tmp_path / "data-00000-of-00001.arrow").read_bytes()
    (tmp_path / "half.arrow").write_bytes(whole[: len(whole) // 2])
    *rows, last = rows_of(tmp_path / "half.arrow")
    assert len(rows) in (40, 80)
    assert isinstance(last.fields, RowError)
    assert (last.position, "no Arrow data from row" in last.fields.evidence) == (len(rows), True)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_column_that_python_cannot_hold_costs_nothing_unless_it_is_needed(name: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "made": pa.array([0, 1], pa.timestamp("us", tz="tzutc()"))})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    rows = rows_of(tmp_path / name)
    assert [fields(row)["text"] for row in rows] == ["one", "two"]
    assert "a value that cannot be read" in json.loads(rows[0].raw)["made"]


def test_arrow_in_the_file_format(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {n}" for n in range(150)]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=40)
    rows = rows_of(tmp_path / "a.arrow")
    assert [(row.position, fields(row)["text"]) for row in rows] == [(n, f"row {n}") for n in range(150)]
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "half.arrow").write_bytes(whole[: len(whole) // 2])
    *_, last = rows_of(tmp_path / "half.arrow")
    assert isinstance(last.fields, RowError)


_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))
_LAYOUTS = [
    pa.array(["one", "two"]),
    pa.array(["one", "two"], pa.string_view()),
    pa.array(["one", "two"]).dictionary_encode(),
    pa.array([[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]], _TURNS),
    pa.array([["one"], ["two"]], pa.list_(pa.string(), 1)),
    pa.array([[("k", "one")], [("k", "two")]], pa.map_(pa.string(), pa.string())),
    pa.array([["one"], ["two"]], pa.large_list_view(pa.binary())),
]


@pytest.mark.parametrize("column", _LAYOUTS, ids=lambda column: str(column.type))
def test_any_byte_of_an_arrow_stream(column: pa.Array, tmp_path: Path) -> None:
    """A damaged offset ended the process, as IPC does not look at them; a damaged length asked for exabytes."""
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema([("x", column.type)])) as writer:
        writer.write_batch(pa.record_batch([column], ["x"]))
    values = [dict(x) if pa.types.is_map(column.type) else x for x in column.to_pylist()]
    assert [fields(row)["x"] for row in rows_of(tmp_path / "a.arrow")] == values
    assert sum(_told_of_each_byte(tmp_path / "a.arrow", 0)) > 20


@pytest.mark.parametrize("changed", [0, 1])
def test_no_byte_of_an_arrow_file_hides_its_rows(changed: int, tmp_path: Path) -> None:
    """Its footer tells where the batches are: of one that says 0 batches, or an empty footer, no row was read."""
    table = pa.table({"x": ["one", "two", "three"]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    whole = (tmp_path / "a.arrow").read_bytes()
    for number, byte in enumerate(whole):
        damaged = bytes([byte ^ 1 if changed else 0])
        (tmp_path / "b.arrow").write_bytes(whole[:number] + damaged + whole[number + 1 :])
        rows = rows_of(tmp_path / "b.arrow")
        assert len(rows) >= 3 or any(isinstance(row.fields, RowError) for row in rows), number
    footer = int.from_bytes(whole[-10:-6], "little")
    (tmp_path / "c.arrow").write_bytes(whole[: -footer - 10])
    *rows, last = rows_of(tmp_path / "c.arrow")
    assert [fields(row)["x"] for row in rows] == ["one", "two", "three"]
    assert isinstance(last.fields, RowError)
    assert last.fields.evidence == "c.arrow is no Arrow data from row 3 on: the last 0 bytes of the file are no footer"


def test_any_byte_of_a_parquet_footer(tmp_path: Path) -> None:
    """To ask it where a column starts ended the process, and a count of rows may be any number."""
    table = pa.table({"text": [f"row {n}" for n in range(9)], "messages": [[{"role": "user"}]] * 9})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    footer = int.from_bytes((tmp_path / "a.parquet").read_bytes()[-8:-4], "little")
    told = _told_of_each_byte(tmp_path / "a.parquet", -footer - 8, rows=9)
    assert sum(told) > len(told) / 3


def _told_of_each_byte(file: Path, first: int, rows: int = 0) -> list[bool]:
    """Return whether damage to each byte of a file is told in a row; if not, `rows` are read, if there are some."""
    whole, told = file.read_bytes(), []
    for number in range(first % len(whole), len(whole)):
        (file.parent / f"b{file.suffix}").write_bytes(
            whole[:number] + bytes([whole[number] ^ 0xFF]) + whole[number + 1 :]
        )
        read = rows_of(file.parent / f"b{file.suffix}")
        told.append(any(isinstance(row.fields, RowError) for row in read))
        assert told[-1] or len(read) == (rows or len(read)), number
    return told


def test_a_damaged_record_batch_costs_its_own_rows(tmp_path: Path) -> None:
    """Text that is no UTF-8 costs its row alone."""
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema([("text", pa.string())])) as writer:
        for texts in (["one", "two"], ["three", "\ue000"], ["five", "six"]):
            writer.write_batch(pa.record_batch([pa.array(texts)], ["text"]))
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "b.arrow").write_bytes(whole.replace("\ue000".encode(), b"\xff\xff\xff"))
    values = [fields(row)["text"] for row in rows_of(tmp_path / "b.arrow")]
    assert [*values[:3], *values[4:]] == ["one", "two", "three", "five", "six"]
    assert "UnicodeDecodeError" in repr(values[3])

    offsets = (0).to_bytes(4, "little") + (5).to_bytes(4, "little") + (8).to_bytes(4, "little")
    assert whole.count(offsets) == 1
    (tmp_path / "c.arrow").write_bytes(whole.replace(offsets, offsets[:4] + b"\xff\xff\xff\x7f" + offsets[8:]))
    rows = rows_of(tmp_path / "c.arrow")
    assert [row.position for row in rows] == list(range(6))
    assert [fields(rows[n])["text"] for n in (0, 1, 4, 5)] == ["one", "two", "five", "six"]
    for row in rows[2:4]:
        assert isinstance(row.fields, RowError)
        assert row.fields.evidence.startswith("c.arrow: the record batch is damaged: ")


def test_a_record_batch_that_says_it_has_no_rows(tmp_path: Path) -> None:
    """All of its counts became 0. Batches that are truly empty have no more than an offset."""
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema([("text", pa.string())])) as writer:
        for rows in (2, 71, 0, 1):
            writer.write_batch(pa.record_batch([pa.array([f"{rows} rows"] * rows, pa.string())], ["text"]))
    whole, count = (tmp_path / "a.arrow").read_bytes(), (71).to_bytes(8, "little")
    assert whole.count(count) == 2
    (tmp_path / "b.arrow").write_bytes(whole.replace(count, bytes(8)))
    *first, lost, last = rows_of(tmp_path / "b.arrow")
    assert [(row.position, fields(row)["text"]) for row in (*first, last)] == [
        *[(n, "2 rows") for n in range(2)],
        (3, "1 rows"),
    ]
    assert isinstance(lost.fields, RowError)
    assert lost.fields.evidence == "b.arrow: a record batch with data says it has no rows"


def test_columns_of_one_name_and_none_at_all(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["text", "n", "n"])
    pq.write_table(twice, tmp_path / "a.parquet")
    (row,) = rows_of(tmp_path / "a.parquet")
    assert fields(row) == {"text": "a", "n": 2}
    pq.write_table(pa.table({"x": [1, 2]}).select([]), tmp_path / "b.parquet")
    rows = pq.ParquetFile(tmp_path / "b.parquet").metadata.num_rows
    assert [fields(row) for row in rows_of(tmp_path / "b.parquet")] == [{}] * rows


def test_parquet_row_groups_belong_to_one_split_each(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(100)]}), path, row_group_size=7)
    for step in (10, 333, 1 << 20):
        rows = rows_of(path, step)
        assert [(row.position, fields(row)["text"]) for row in rows] == [(n, f"row {n}") for n in range(100)]


def test_damaged_parquet_is_told_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"{n}" * 50 for n in range(20)]}),
        path,
        row_group_size=10,
        compression="none",
        use_dictionary=False,
    )
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    rows = rows_of(path)
    assert [row.position for row in rows] == list(range(20))
    assert [isinstance(row.fields, RowError) for row in rows] == [False] * 10 + [True] * 10
    (tmp_path / "b.parquet").write_bytes(b"no parquet at all")
    (lost,) = rows_of(tmp_path / "b.parquet")
    assert "b.parquet is no parquet file" in lost.fields.evidence


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_objects_of_a_table_have_the_fields_of_their_own_row_alone(name: str, tmp_path: Path) -> None:
    """A table has one type for all calls: else each would be trained with the others' arguments, as null."""
    calls = [{"name": "weather", "arguments": {"town": "Oslo"}}, {"name": "add", "arguments": {"a": 1, "b": [1, None]}}]
    table = pa.Table.from_pylist([{"calls": [call], "note": None} for call in calls])
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    assert [fields(row) for row in rows_of(tmp_path / name)] == [{"calls": [call], "note": None} for call in calls]


def test_streams_joined_by_cat_are_read_to_the_end(tmp_path: Path) -> None:
    streams = []
    for number in range(2):
        table = pa.table({"text": [f"row {number} {n}" for n in range(3)]})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        streams.append(sink.getvalue().to_pybytes())
    (tmp_path / "a.arrow").write_bytes(b"".join(streams))
    rows = rows_of(tmp_path / "a.arrow")
    assert [(row.position, fields(row)["text"]) for row in rows] == [
        (number, f"row {number // 3} {number % 3}") for number in range(6)
    ]
    (tmp_path / "a.arrow").write_bytes(streams[0] + b"garbage")
    *rows, last = rows_of(tmp_path / "a.arrow")
    assert len(rows) == 3
    assert isinstance(last.fields, RowError)


def test_maps_are_objects(tmp_path: Path) -> None:
    """As Spark and DuckDB write them; keys that JSON does not have cost nothing."""
    turns = pa.list_(pa.map_(pa.string(), pa.string()))
    table = {
        "messages": pa.array([[[("role", "user"), ("content", "x")]], [[("role", "a"), ("role", "b")]]], turns),
        "made": pa.array([[(b"\xff", 1)], None], pa.map_(pa.binary(), pa.int32())),
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    first, twice = rows_of(tmp_path / "a.parquet")
    assert fields(first)["messages"] == [{"role": "user", "content": "x"}]
    assert json.loads(first.raw)["made"] == {"b'\\xff'": 1}
    assert "a value that cannot be read" in repr(fields(twice)["messages"])
