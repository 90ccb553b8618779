"""Formats of raw files beside plain jsonl and parquet, which test_datasets.py has."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.checks import MAX_ROW, Reason, RowError
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
        ("a.jsonl.bz2", bz2.compress(TEXT)),
        ("a.jsonl.bz2", bz2.compress(TEXT[:20]) + bz2.compress(TEXT[20:])),  # as pbzip2 makes it
        ("a.jsonl.xz", lzma.compress(TEXT)),
        ("a.jsonl.xz", lzma.compress(TEXT[:20]) + lzma.compress(TEXT[20:])),
        ("a.json", TEXT),
        ("a.json.gz", gzip.compress(TEXT)),
        ("a.json.zst", zstd(TEXT)),
    ],
)
def test_compressed_lines_are_the_lines(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    rows = rows_of(tmp_path / name, step=7)
    assert [row.position for row in rows] == PLACES
    assert [row.fields for row in rows[:2]] == [{"text": "one"}, {"text": "zwölf"}]
    assert isinstance(rows[2].fields, RowError)
    assert "invalid UTF-8" in rows[2].fields.evidence


COMPRESS = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_a_damaged_end_costs_the_rows_behind_it(suffix: str, tmp_path: Path) -> None:
    text = b"".join(json.dumps({"text": f"{n} {n**99}"}).encode() + b"\n" for n in range(20_000))
    data = COMPRESS[suffix](text)
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
    assert (last.position, "no Arrow data from row" in last.fields.evidence) == (len(rows), True)


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


EVERY_KIND = ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.json", "a.parquet", "a.arrow", "a.tar", "a.tar.gz"]


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_file_that_went_since_it_was_listed_is_no_bad_row(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has changed since it was listed"):
        list(read(Folder(str(tmp_path)), Split(name, 0, 1000, 1000)))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="has changed since it was listed"):
        list(read(Folder(str(tmp_path)), Split(name, 0, 1000, 1000)))


# --- .json


def json_rows(tmp_path: Path, data: bytes, name: str = "a.json") -> list[RawRow]:
    (tmp_path / name).write_bytes(data)
    return rows_of(tmp_path / name, step=7)


def test_an_array_is_its_elements(tmp_path: Path) -> None:
    """Also without a line break, after a byte order mark, in a compressed file, and across many reads."""
    elements = [{"text": '[1, 2] \\ " } é 😀'}, {"text": "x" * 9_000_000}, {"nested": [{"a": [1, {}]}]}, {"text": ""}]
    for data in (
        json.dumps(elements, ensure_ascii=False).encode(),
        b"\xef\xbb\xbf \n" + json.dumps(elements, indent=1).encode() + b"\n",
    ):
        rows = json_rows(tmp_path, data)
        assert [(row.position, row.fields) for row in rows] == list(enumerate(elements))
        assert [json.loads(row.raw) for row in rows] == elements
        for suffix, compress in COMPRESS.items():
            assert [row.fields for row in json_rows(tmp_path, compress(data), f"a.json.{suffix}")] == elements
    joined = json_rows(tmp_path, b'[{"a": 1}]\n\xef\xbb\xbf[]\n[{"a": 2}, {"a": 3}]\n')
    assert [(row.position, row.fields) for row in joined] == [(n, {"a": n + 1}) for n in range(3)]
    assert json_rows(tmp_path, b"[]") == []
    assert json_rows(tmp_path, b"") == []


@pytest.mark.parametrize(
    ("data", "good", "says"),
    [
        (b'[{"a": 1}, {"a": 2}', 2, "the array is not closed after 2 rows"),
        (b'[{"a": 1}, {"a": 2},', 2, "no JSON from row 2 of the array on"),
        (b'[{"a": 1} {"a": 2}]', 1, "the array is not closed after 1 rows"),
        (b'[{"a": 1}, {"a": "cut', 1, "no JSON from row 1 of the array on"),
        (b'[{"a": 1}, {"a": nope}, {"a": 3}]', 1, "no JSON from row 1 of the array on"),
        (b"[", 0, "the array is not closed after 0 rows"),
        (b"[" * 100_000, 0, "no JSON from row 0"),
        (b'[{"a": 1}] {"a": 2}', 1, "behind 1 rows the array ends, not the file"),
    ],
)
def test_a_damaged_array_keeps_what_is_before(data: bytes, good: int, says: str, tmp_path: Path) -> None:
    *rows, last = json_rows(tmp_path, data)
    assert [row.fields for row in rows] == [{"a": n + 1} for n in range(good)]
    assert isinstance(last.fields, RowError)
    assert (last.position, says in last.fields.evidence) == (good, True), last.fields.evidence


def test_elements_that_are_no_rows_cost_themselves_alone(tmp_path: Path) -> None:
    rows = json_rows(tmp_path, b'[1234, "x", {"a": "\xff"}, {"a": 1}]')
    assert [row.position for row in rows] == [0, 1, 2, 3]
    assert [isinstance(row.fields, RowError) for row in rows] == [True, True, False, False]
    assert rows[2].fields == {"a": "\udcff"}  # no text: whoever hashes the row refuses it
    assert rows[2].raw == '{"a": "\\udcff"}'


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x"}], "images": []}
    assert [r.fields for r in json_rows(tmp_path, json.dumps(row, indent=2).encode())] == [row]
    broken_first = b'{broken\n{"a": 1}\n{"a": 2}\n'
    first, *rest = json_rows(tmp_path, broken_first)
    assert isinstance(first.fields, RowError)
    assert [r.fields for r in rest] == [{"a": 1}, {"a": 2}]
    (cut,) = json_rows(tmp_path, b'{\n "a": 1,\n "b"')
    assert isinstance(cut.fields, RowError)


# --- what is inside of a file never ends a job


def test_half_a_surrogate_is_written_as_its_escape(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}]
    data = b'{"caption": "cut \\ud83d", "messages": ' + json.dumps(turns).encode() + b"}"
    (tmp_path / "a.tar").write_bytes(tar([("a.json", data)]))
    (row,) = rows_of(tmp_path / "a.tar")
    assert fields(row)["messages"] == turns
    assert json.loads(row.raw)["caption"] == "cut \ud83d"
    row.raw.encode()


def test_member_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("\udcff.json", b"{damaged"), ("\udcff.jpg", b"JPEG")], tarfile.GNU_FORMAT))
    (row,) = rows_of(tmp_path / "a.tar")
    assert isinstance(row.fields, RowError)
    assert "no JSON" in row.fields.evidence
    row.raw.encode()
    row.fields.evidence.encode()


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


def test_columns_of_one_name_and_none_at_all(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["text", "n", "n"])
    pq.write_table(twice, tmp_path / "a.parquet")
    (row,) = rows_of(tmp_path / "a.parquet")
    assert fields(row) == {"text": "a", "n": 2}
    pq.write_table(pa.table({"x": [1, 2]}).select([]), tmp_path / "b.parquet")
    rows = pq.ParquetFile(tmp_path / "b.parquet").metadata.num_rows
    assert [fields(row) for row in rows_of(tmp_path / "b.parquet")] == [{}] * rows


def test_base64_in_a_row_is_kept_as_its_length(tmp_path: Path) -> None:
    uri = "data:image/png;base64," + "iVBORw0KGgo/" * 4000
    for line in (json.dumps({"images": [uri]}), json.dumps({"images": [uri]}).replace("/", "\\/")):
        (tmp_path / "a.jsonl").write_text(line)
        (row,) = rows_of(tmp_path / "a.jsonl")
        assert fields(row) == {"images": [uri]}
        assert len(row.raw) < 200
        assert "characters>" in json.loads(row.raw)["images"][0]
    assert "<48000 characters>" in RowError(Reason.IMAGE_MISSING, uri).evidence


# --- tars


def test_equal_names_and_names_that_differ_in_case(tmp_path: Path) -> None:
    turns = json.dumps({"messages": []}).encode()
    (tmp_path / "a.tar").write_bytes(tar([("a.jpg", b"1"), ("a.jpg", b"2"), ("a.json", turns)]))
    (row,) = rows_of(tmp_path / "a.tar")
    assert isinstance(row.fields, RowError)
    assert row.fields.evidence == "the tar has 2 members named a.jpg"
    (tmp_path / "b.tar").write_bytes(tar([("b.jpg", b"1"), ("b.JPG", b"2"), ("b.JSON", turns), ("c.TXT", b"c")]))
    first, second = rows_of(tmp_path / "b.tar")
    assert fields(first) == {"jpg": b"1", "JPG": b"2", "images": [b"1", b"2"], "messages": []}
    assert fields(second) == {"txt": "c", "images": []}
    (tmp_path / "c.tar").write_bytes(tar([("c.json", turns), ("c.JSON", turns)]))
    (row,) = rows_of(tmp_path / "c.tar")
    assert isinstance(row.fields, RowError)
    assert "c.json and c.JSON" in row.fields.evidence


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_tars_joined_by_cat_are_read_to_the_end(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    first, second = (tar([(f"{n}.txt", f"{n}".encode())]) for n in (1, 2))
    name = "a.tar" if pack is bytes else "a.tar.gz"
    (tmp_path / name).write_bytes(pack(first + second))
    assert [(row.position, fields(row)["txt"]) for row in rows_of(tmp_path / name)] == [(0, "1"), (len(first), "2")]
    (tmp_path / name).write_bytes(pack(first + b"no tar" * 200))
    one, damage = rows_of(tmp_path / name)
    assert fields(one)["txt"] == "1"
    assert isinstance(damage.fields, RowError)
    assert damage.fields.evidence == f"{name} is no tar from its byte {len(first)} on"


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"])
def test_links_have_the_bytes_of_their_members(name: str, tmp_path: Path) -> None:
    """Hard links, whose name is in full; symbolic ones, forward and back, over another link; and one to nowhere."""
    links = [
        ("s/1.jpg", tarfile.LNKTYPE, "s/0.jpg"),
        ("s/2.jpg", tarfile.SYMTYPE, "../t/9.jpg"),
        ("s/3.jpg", tarfile.SYMTYPE, "2.jpg"),
        ("s/4.jpg", tarfile.SYMTYPE, "4.jpg"),
    ]
    suffix = name.rpartition(".")[2]
    mode: Any = "w:" + {"gz": "gz", "tgz": "gz", "bz2": "bz2", "xz": "xz"}.get(suffix, "")  # a literal in the stubs
    with tarfile.open(tmp_path / name, mode) as archive:
        for member, kind, target in [("s/0.jpg", tarfile.REGTYPE, ""), *links, ("t/9.jpg", tarfile.REGTYPE, "")]:
            info = tarfile.TarInfo(member)
            info.type, info.linkname = kind, target
            data = f"bytes of {member}".encode() if kind == tarfile.REGTYPE else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    *rows, loop, last = rows_of(tmp_path / name)
    zero, nine = b"bytes of s/0.jpg", b"bytes of t/9.jpg"
    assert [fields(row)["images"] for row in [*rows, last]] == [[zero], [zero], [nine], [nine], [nine]]
    assert isinstance(loop.fields, RowError)
    assert loop.fields.evidence == "s/4.jpg is a link that leads to no file in the tar"


def test_a_damaged_compressed_tar_keeps_what_is_before(tmp_path: Path) -> None:
    data = gzip.compress(tar([(f"{n}.txt", f"{n} {n**999}".encode()) for n in range(1, 40)]))
    (tmp_path / "a.tar.gz").write_bytes(data[: len(data) // 2])
    *rows, last = rows_of(tmp_path / "a.tar.gz")
    assert [fields(row)["txt"].split()[0] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    assert len(rows) > 5
    assert isinstance(last.fields, RowError)
    assert "is damaged after its byte" in last.fields.evidence
