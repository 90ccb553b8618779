"""Formats of raw files beside plain jsonl and parquet, which test_datasets.py has."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.checks import MAX_ROW, RowError
from pipeline.datasets import dataset
from pipeline.readers import RawRow, Split, plan, read

LINES = [b'{"text": "one"}', b"", '{"text": "zwölf"}'.encode(), b'{"text": "\xff"}']
TEXT = b"\n".join(LINES)
PLACES = [0, 17, 36]  # of the three rows in TEXT


def rows_of(path: Path, step: int = 1 << 20) -> list[RawRow]:
    tasks = plan([(path.name, path.stat().st_size)], step)
    return [row for task in tasks for split in task for row in read(Folder(str(path.parent)), split)]


def zstd(data: bytes) -> bytes:
    compressed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return compressed


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", TEXT),
        ("a.jsonl.gz", gzip.compress(TEXT)),
        ("a.JSONL.GZ", gzip.compress(TEXT[:20]) + gzip.compress(TEXT[20:])),  # as `cat a.gz b.gz` makes it
        ("a.jsonl.zst", zstd(TEXT)),
        ("a.ndjson.zst", zstd(TEXT[:20]) + zstd(TEXT[20:])),
    ],
)
def test_compressed_lines_are_the_lines(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    rows = rows_of(tmp_path / name, step=7)
    assert [row.position for row in rows] == PLACES
    assert [row.fields for row in rows[:2]] == [{"text": "one"}, {"text": "zwölf"}]
    assert isinstance(rows[2].fields, RowError)
    assert "invalid UTF-8" in rows[2].fields.evidence


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_damaged_end_costs_the_rows_behind_it(suffix: str, tmp_path: Path) -> None:
    text = b"".join(json.dumps({"text": f"{n} {n**99}"}).encode() + b"\n" for n in range(20_000))
    data = gzip.compress(text, 1) if suffix == "gz" else zstd(text)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(data[: len(data) // 2])
    *rows, last = rows_of(tmp_path / f"a.jsonl.{suffix}")
    good = [row for row in rows if isinstance(row.fields, dict)]
    assert len(good) > 5000
    assert [row.raw for row in good] == text.decode().splitlines()[: len(good)]
    assert isinstance(last.fields, RowError)
    assert "cannot be decompressed" in last.fields.evidence
    assert last.position > good[-1].position
    assert len({row.position for row in [*rows, last]}) == len(rows) + 1


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_row_longer_than_memory_should_hold(ending: bytes, tmp_path: Path) -> None:
    """Its splits too see one row, and the one behind it."""
    with open(tmp_path / "a.jsonl", "wb") as stream:
        stream.write(b'{"text": "')
        for _ in range(3):
            stream.write(b"x" * MAX_ROW)
        stream.write(b'"}' + ending)
        stream.write(b'{"text": "short"}' if ending else b"")
    first, *others = rows_of(tmp_path / "a.jsonl", step=50 << 20)
    assert isinstance(first.fields, RowError)
    assert str(first.fields.reason) == "row_too_large"
    assert f"{3 * MAX_ROW + 12 + len(ending)} bytes, limit {MAX_ROW}" in first.fields.evidence
    assert len(first.raw) == 1000
    assert [(row.position, row.fields) for row in others] == ([(3 * MAX_ROW + 13, {"text": "short"})] if ending else [])


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
    assert (last.position, "no Arrow stream from row" in last.fields.evidence) == (len(rows), True)


def tar(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def fields(row: RawRow) -> dict[str, Any]:
    assert isinstance(row.fields, dict), row.fields
    return row.fields


def test_webdataset(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a cat"}]
    members = [
        ("./train/000.jpg", b"JPEG"),
        ("./train/000.txt", "eine Kätze".encode()),
        ("./train/000.cls", b"3"),
        ("./train/._000.jpg", b"of a Mac"),
        ("./train/001.left.png", b"LEFT"),
        ("./train/001.right.png", b"RIGHT"),
        ("./train/001.json", json.dumps({"messages": turns, "images": ["001.right.png", "b.jpg"]}).encode()),
        ("./train/002.json", b'{"image": "002.png", "conversations": []}'),
        ("./train/002.png", b"PNG"),
        ("./train/003.json", b"[1]"),
        ("./train/003.png", b"PNG"),
        ("./train/004.txt", b"\xff"),
        (f"./train/{'long' * 60}.txt", b"name"),
    ]
    (tmp_path / "a.tar").write_bytes(tar(members))
    first, second, third, bad, worse, long = rows_of(tmp_path / "a.tar", step=10)
    assert fields(first) == {"jpg": b"JPEG", "txt": "eine Kätze", "cls": b"3", "images": [b"JPEG"]}
    assert dataset("messages").sample(fields(second)).images == (b"RIGHT", "b.jpg")
    assert dataset("llava").sample(fields(third)).images == (b"PNG",)
    assert isinstance(bad.fields, RowError)
    assert json.loads(bad.raw) == {"003.json": "[1]", "003.png": "<3 bytes>"}
    assert isinstance(worse.fields, RowError)
    assert "004.txt has invalid UTF-8 at byte 0" in worse.fields.evidence
    assert fields(long)["txt"] == "name"
    assert [row.position % 512 for row in (first, second, third, bad, worse, long)] == [0] * 6
    assert (first.position, second.position) == (0, 8 * 512)


def test_a_damaged_tar_keeps_what_is_before(tmp_path: Path) -> None:
    data = bytearray(tar([(f"{n}.txt", b"text %d" % n) for n in range(5)], tarfile.USTAR_FORMAT))
    (tmp_path / "cut.tar").write_bytes(data[: 5 * 512 + 3])
    *rows, last = rows_of(tmp_path / "cut.tar")
    assert [fields(row)["txt"] for row in rows] == ["text 0"]  # the next one may have had more members
    assert isinstance(last.fields, RowError)
    data[6 * 512 + 20 : 6 * 512 + 200] = b"\x7f" * 180  # the fourth header
    (tmp_path / "header.tar").write_bytes(data)
    *rows, last = rows_of(tmp_path / "header.tar")
    assert [fields(row)["txt"] for row in rows] == ["text 0", "text 1", "text 2"]
    assert isinstance(last.fields, RowError)
    assert (last.position, "no tar from its byte 3072" in last.fields.evidence) == (3072, True)
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    (row,) = rows_of(tmp_path / "none.tar")
    assert isinstance(row.fields, RowError)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "a.tar"])
def test_a_file_that_went_since_it_was_listed_is_no_bad_row(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has changed since it was listed"):
        list(read(Folder(str(tmp_path)), Split(name, 0, 1000, 1000)))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="has changed since it was listed"):
        list(read(Folder(str(tmp_path)), Split(name, 0, 1000, 1000)))
