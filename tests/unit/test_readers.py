"""How raw files are split into tasks, and the reader of lines, compressed or not."""

import bz2
import gzip
import io
import json
import lzma
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.checks import MAX_ROW, Reason, RowError
from pipeline.readers import Split, plan, read
from tests.support.raw_rows import COMPRESS, fields, rows_of, zstd

LINES = [b'{"text": "one"}', b"", '{"text": "zwölf"}'.encode(), b'{"text": "\xff"}']
TEXT = b"\n".join(LINES)
PLACES = [0, 17, 36]  # of the three rows in TEXT


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
        ("a.jsonl.xz", lzma.compress(TEXT[:20]) + bytes(8) + lzma.compress(TEXT[20:]) + bytes(4)),  # as tools pad it
        ("a.jsonl.gz", gzip.compress(TEXT[:20]) + bytes(512) + gzip.compress(b"") + gzip.compress(TEXT[20:])),
        ("a.jsonl.bz2", bz2.compress(TEXT[:20]) + bytes(1) + bz2.compress(TEXT[20:])),
        ("a.json", TEXT),
        ("a.json.gz", gzip.compress(TEXT)),
        ("a.json.zst", zstd(TEXT)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip's bytes have the second in which they were made
)
def test_compressed_lines_are_the_lines(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    rows = rows_of(tmp_path / name, step=7)
    assert [row.position for row in rows] == PLACES
    assert [row.fields for row in rows[:2]] == [{"text": "one"}, {"text": "zwölf"}]
    assert isinstance(rows[2].fields, RowError)
    assert "invalid UTF-8" in rows[2].fields.evidence


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


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
@pytest.mark.parametrize("behind", [b"garbage", bytes(4) + b"garbage", b""])
def test_what_cannot_be_read_behind_the_first_member_is_told(suffix: str, behind: bytes, tmp_path: Path) -> None:
    """Python's own readers take it for the end of the file; Arrow's gives nothing of the first member either."""
    compress = COMPRESS[suffix]
    behind = behind or compress(b'{"text": "cut"}\n')[:-5]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(b'{"text": "good"}\n') + behind)
    first, *_, last = rows_of(tmp_path / f"a.jsonl.{suffix}")
    assert first.fields == {"text": "good"}
    assert isinstance(last.fields, RowError)
    assert "cannot be decompressed from here on" in last.fields.evidence


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.json.gz"])
def test_no_row_of_a_file_that_fails_its_checksum_is_taken_for_sound(name: str, tmp_path: Path) -> None:
    """A changed byte makes other words long before the checksum tells."""
    rows = [json.dumps({"text": f"row {n} {n**9}"}) for n in range(2_000)]
    text = "\n".join(rows) if name != "a.json.gz" else f"[{','.join(rows)}]"
    data = bytearray(COMPRESS[name.rpartition(".")[2]](f"{text}\n".encode()))
    data[-6] ^= 0xFF
    (tmp_path / name).write_bytes(data)
    *found, last = rows_of(tmp_path / name)
    assert [row.raw for row in found] == rows
    assert all(f"{name} is damaged, so none of its rows is certain" in str(row.fields) for row in found)
    assert "cannot be decompressed from here on" in str(last.fields)
    data[len(data) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(data)
    assert all(isinstance(row.fields, RowError) for row in rows_of(tmp_path / name))


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


EVERY_KIND = ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.json", "a.parquet", "a.arrow", "a.tar", "a.tar.gz"]


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_file_that_went_since_it_was_listed_is_no_bad_row(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has changed since it was listed"):
        list(read(Folder(str(tmp_path)), Split(name, 0, 1000, 1000)))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="has changed since it was listed"):
        list(read(Folder(str(tmp_path)), Split(name, 0, 1000, 1000)))


def test_base64_in_a_row_is_kept_as_its_length(tmp_path: Path) -> None:
    uri = "data:image/png;base64," + "iVBORw0KGgo/" * 4000
    for line in (json.dumps({"images": [uri]}), json.dumps({"images": [uri]}).replace("/", "\\/")):
        (tmp_path / "a.jsonl").write_text(line)
        (row,) = rows_of(tmp_path / "a.jsonl")
        assert fields(row) == {"images": [uri]}
        assert len(row.raw) < 200
        assert "characters>" in json.loads(row.raw)["images"][0]
    assert "<48000 characters>" in RowError(Reason.IMAGE_MISSING, uri).evidence


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["", "{}", '{"a": 1}', '{"text": "é"}\r', " ", "x" * 50]), max_size=20),
    st.integers(1, 40),
    st.booleans(),
)
def test_any_splits_of_a_file_give_the_rows_of_the_whole(lines: list[str], step: int, ends: bool) -> None:
    data = ("\n".join(lines) + "\n" * ends).encode()
    folder = Folder(tempfile.mkdtemp())
    folder.write("a.jsonl", data)
    expected, offset = [], 0
    for line in io.BytesIO(data):
        if line.strip():
            expected.append((offset, line.strip().decode()))
        offset += len(line)
    found = [
        (row.position, row.raw)
        for task in plan([("a.jsonl", len(data))], step)
        for split in task
        for row in read(folder, split)
    ]
    assert found == expected


def test_plan_splits_large_files_and_joins_small_ones() -> None:
    sizes = {"a.jsonl": 25, "b.jsonl": 3, "c.parquet": 2, "d.jsonl": 0, "e.jsonl": 9, "f.jsonl.gz": 30}
    tasks = plan(list(sizes.items()), 10)
    ranges = [[(split.file, split.start, split.end) for split in task] for task in tasks]
    assert ranges == [
        [("a.jsonl", 0, 10)],
        [("a.jsonl", 10, 20)],
        [("a.jsonl", 20, 25), ("b.jsonl", 0, 3), ("c.parquet", 0, 2)],
        [("e.jsonl", 0, 9)],
        [("f.jsonl.gz", 0, 30)],
    ]
    tasks = plan([("a.jsonl", 6), ("b.jsonl", 15), ("c.jsonl.gz", 8)], 10)
    assert [[(split.file, split.start, split.end) for split in task] for task in tasks] == [
        [("a.jsonl", 0, 6), ("b.jsonl", 0, 4)],
        [("b.jsonl", 4, 14)],
        [("b.jsonl", 14, 15), ("c.jsonl.gz", 0, 8)],
    ]


def test_json_that_is_none(tmp_path: Path) -> None:
    lines = [b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000, b"1" * 5000, b'{"ok": 1}']
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    rows = rows_of(tmp_path / "a.jsonl")
    assert rows[-1].fields == {"ok": 1}
    evidence = [row.fields.evidence for row in rows[:-1]]
    for found, says in zip(
        evidence, ["no JSON", "an object is needed", "an object", "invalid UTF-8 at byte 0", "", ""]
    ):
        assert says in found
    assert rows[3].raw == "\\xff"
